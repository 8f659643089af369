"""The README's table of architectures, worked out from who sits which test.

A cell is ticked if the kind is among the parameters of the test that stands for its column. If the
README has another table, the failing test prints the one that it should have.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import test_compile
import test_exam
from cases import CHANNELS, MIXERS

from kizzasi.errors import CheckpointError, SpecError
from kizzasi.models import BlockSpec, ModelSpec, build_model, presets
from kizzasi.models.channels import MoESpec, RWKVChannelSpec
from kizzasi.models.checkpoints import foreign
from kizzasi.models.checkpoints.names import apply, written
from kizzasi.models.mixer import ChannelSpec
from kizzasi.models.mixers import Mamba2Spec, RWKV5Spec

COLUMNS = {
    "parallel": test_exam.test_reference_equals_torch_engine,
    "chunked": test_exam.test_any_split_with_the_state_carried_equals_one_call,
    "step": test_exam.test_forward_equals_fold_of_step,
    "packed": test_exam.test_packed_equals_separate,
    "padded": test_exam.test_left_padded_equals_unpadded,
    "compile": test_compile.test_forward_and_its_gradients_compile_to_one_graph,
}


def kinds_in(test) -> set[str]:
    """The kinds that a test is run for."""
    marks = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    names = next(mark.args[1] for mark in marks if mark.args[0] == "name")
    return {name.split("-")[0] for name in names}


def papers(part) -> str:
    """What the module's docstring names first as its source."""
    text = sys.modules[type(part).__module__].__doc__ or ""
    source = text.split("Source:")[-1]
    found = re.search(r"arXiv:\d{4}\.\d{5}", " ".join(source.split()))
    return f"[{found[0][6:]}](https://arxiv.org/abs/{found[0][6:]})" if found else ""


def published() -> list[ModelSpec]:
    """One architecture of each family that a checkpoint format may hold."""
    six, llama = presets.rwkv6(64, 2, 32), presets.llama(64, 2, 4, 2, 128, 32)
    plain = llama.blocks[0]

    def like_llama(norm: object, channel: ChannelSpec, **changes: object) -> ModelSpec:
        heads = replace(plain.mixer, qk_norm=norm, **changes)
        return llama.replace(blocks=(BlockSpec(heads, channel),) * 2, norm_eps=1e-6)

    five = BlockSpec(RWKV5Spec(), RWKVChannelSpec(version=4, hidden=224), "layer")
    rotated = BlockSpec(replace(plain.mixer, rope_dims=8), plain.channel)
    bamba = (BlockSpec(Mamba2Spec(head_dim=16, d_state=16), plain.channel), rotated)
    few_experts = MoESpec(n_experts=4, hidden=48)
    qwen = presets.qwen3_next_80b()
    few = [replace(b, channel=replace(b.channel, n_experts=16)) for b in qwen.blocks[:4]]
    jamba = presets.jamba_52b()
    return [
        like_llama(False, plain.channel, qkv_bias=True),
        like_llama(True, plain.channel),
        like_llama(True, few_experts),
        like_llama("full", replace(few_experts, normalize="all")),
        llama.replace(blocks=bamba),
        six,
        six.replace(blocks=(five, five)),
        qwen.replace(blocks=tuple(few)),
        jamba.replace(blocks=jamba.blocks[:8]),
        presets.rwkv4(64, 2, 32),
        presets.rwkv7(64, 2, 32),
        presets.mamba(64, 2, 32),
        presets.mamba2(64, 2, 32),
        presets.falcon_mamba_7b(),
        presets.smollm2_135m(),
        presets.gpt2_124m(),
        presets.mixtral_8x7b(),
    ]


def formats() -> dict[str, set[str]]:
    """Kinds of mixer and channel -> names of the foreign formats that hold them, both ways."""
    held: dict[str, set[str]] = {}
    for spec in published():
        for family in foreign.FAMILIES.values():
            try:
                held_back = _there_and_back(family, spec)
            except (SpecError, CheckpointError):
                continue  # the format cannot express it
            if held_back:
                for _, part in spec.parts():
                    held.setdefault(part.kind, set()).add(family.name)
    return held


def _there_and_back(family: foreign.Family, spec: ModelSpec) -> bool:
    """What the format says of a spec, read again, is that spec."""
    spec = family.canonical(spec)
    data = {} if family.config is None else family.config(spec)
    ours = build_model(spec, device="meta").state_dict()
    tensors = written(apply(family.layouts(spec)[0], list(ours)), ours)
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    return foreign.read_spec(family, data, shapes, "") == spec


def table() -> str:
    """The table in Markdown."""
    columns = {name: kinds_in(test) for name, test in COLUMNS.items()}
    held = formats()
    head = ["architecture", "paper", *columns, "foreign checkpoints"]
    lines = [head, ["---", "---", *[":-:"] * len(columns), "---"]]
    parts = {}
    for name, part in {**MIXERS, **CHANNELS}.items():
        parts.setdefault(name.split("-")[0], part)
    for kind, part in parts.items():
        ticks = ["✓" if kind in kinds else "" for kinds in columns.values()]
        lines.append([f"`{kind}`", papers(part), *ticks, ", ".join(sorted(held.get(kind, ())))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def test_readme_shows_the_table():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    expected = table()
    assert expected in readme, f"README.md: its table of architectures must be\n\n{expected}"
