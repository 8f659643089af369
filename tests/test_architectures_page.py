"""docs/architectures.md: every mixer has its section, and the table is what the specs say."""

import re
from pathlib import Path

import pytest

import kizzasi.eml  # noqa: F401 (registers eml_attention)
from kizzasi.errors import SpecError
from kizzasi.models.mixer import LayerContext, MixerSpec

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
SECTIONS = re.findall(r"^### `(\w+)`\n(.*?)(?=^##)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
COMPOSITES = {"parallel", "routed", "sequence_routed", "bidirectional"}
MUST_SAY = {
    "mla": {
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 48,
        "qk_rope_head_dim": 16,
        "v_head_dim": 64,
    },
}


def spec_of(kind: str) -> MixerSpec:
    """The mixer of default settings, with 4 heads where heads must be named."""
    for settings in ({}, {"n_heads": 4}):
        try:
            spec = MixerSpec.from_dict({"kind": kind, **MUST_SAY.get(kind, {}), **settings})
            spec.check(256, kind)
            return spec
        except SpecError as error:
            last = error
    raise last


def table() -> str:
    """The page's table."""
    rows = [
        "| mixer | parameters | flops/token | state at 1,024 | state at 32,768 |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for kind in sorted(set(MixerSpec.known()) - COMPOSITES):
        spec = spec_of(kind)
        short, long = (spec.cost(LayerContext(256), t, 1) for t in (1024, 32768))
        figures = (short.params, short.flops // 1024, short.state_bytes, long.state_bytes)
        rows.append(f"| `{kind}` | " + " | ".join(f"{n:,}" for n in figures) + " |")
    return "\n".join(rows)


def test_every_mixer_has_a_section():
    assert sorted(kind for kind, _ in SECTIONS) == sorted(MixerSpec.known())


@pytest.mark.parametrize("kind", sorted(MixerSpec.known()))
def test_a_section_says_equation_state_cost_paper_and_when_to_choose_it(kind):
    text = dict(SECTIONS)[kind]
    assert [word for word in ("*State*", "*Cost*", "*Choose it*") if word not in text] == []
    assert re.search(r"[)\w\]] (=|<-) ", text), "no equation"
    published = re.search(r"\[(\d{4}\.\d{5})\]\(https://arxiv\.org/abs/\1\)", text)
    assert published or kind == "eml_attention", "no paper"


def test_the_table_is_what_the_specs_say():
    assert table() in PAGE.read_text(), f"the page should have\n{table()}"
