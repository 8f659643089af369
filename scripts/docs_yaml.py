"""Write docs/yaml.md: every key of a model's and of a search's YAML, read off the dataclasses.

`python scripts/docs_yaml.py` writes it; a test says when it must be written anew.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Union

import yaml
from docs_fields import meanings

import kizzasi.eml  # noqa: F401 (registers eml_attention)
from kizzasi.models import ChannelSpec, LayerSpec, MixerSpec, ModelSpec
from kizzasi.models.attention.rope_scaling import RopeScaling
from kizzasi.models.heads import HeadSpec
from kizzasi.models.parts.router import RouterSpec
from kizzasi.models.stems import StemSpec
from kizzasi.nas import SearchConfig
from kizzasi.nas.study.config_file import NAMED, SECTIONS, nested
from kizzasi.strict import Registered, field_types
from kizzasi.train import Recipe

PAGE = Path(__file__).parent.parent / "docs" / "yaml.md"
FAMILIES = (
    ("Layers", "an entry of `blocks`", LayerSpec),
    ("Mixers", "`mixer` of a block", MixerSpec),
    ("Channels", "`channel` of a block", ChannelSpec),
    ("Stems", "`stem` of a model", StemSpec),
    ("Heads", "an entry of `heads`", HeadSpec),
    ("Routers", "`router` of the channel `moe`", RouterSpec),
)
INTRO = """# YAML

Every key that a file may hold; `scripts/docs_yaml.py` reads this page off the code. A key that is
not here is an error that names its path and the nearest known key; so is a value of another type.
`None` in a meaning is `null` in a file, and "above" is the head of the file that is named.

A file is a **model** (`ModelSpec.from_file`, `kizzasi train`, `info`, `validate`), a **space** (a
model with holes: `kizzasi search --space`), a **search** (`kizzasi search --config`) or a
[pipeline](pipelines.md), whose keys `kizzasi schema` prints.

## A model

```python
from kizzasi.models import ModelSpec

text = \"\"\"
d_model: 64
stem: {kind: tokens, vocab_size: 256}
blocks:                    # a list of layers, or a pattern of them
  pattern: mma             # as many letters as layers, or repeated until n_layers are there
  n_layers: 6
  letters:
    m: {mixer: {kind: mamba}}
    a: {mixer: {kind: attention, n_heads: 4}, channel: {kind: swiglu}}
\"\"\"
with open("model.yaml", "w") as file:
    file.write(text)
spec = ModelSpec.from_file("model.yaml")
assert [block.mixer.kind for block in spec.blocks] == ["mamba", "mamba", "attention"] * 2
```
"""
SPACE = """## A space

In the file of a model any value may be a hole. `choice` takes one of its options, `repeat` makes a
list of `low` to `high` copies, each filled on its own; `pattern` and `n_layers` may be holes too.

```python
from kizzasi.nas import ModelSpace

text = \"\"\"
d_model: {choice: [32, 48]}
stem: {kind: tokens, vocab_size: 256}
blocks:
  repeat:
    mixer:
      choice:
        - {kind: mamba, d_state: {choice: [8, 16]}}
        - {kind: attention, n_heads: 4}
  low: 1
  high: 3
\"\"\"
with open("space.yaml", "w") as file:
    file.write(text)
assert ModelSpace.from_file("space.yaml").size == 2 * (3 + 3**2 + 3**3)
```
"""
SEARCH = """## A search

Settings by section, as a run writes them into its `config.yaml`. What the chosen searcher,
scheduler or screens do not read is refused. All settings of the default search:

```yaml
{config}```
"""


def shown(hint: Any) -> str:
    """A type as a person would say it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(shown(arg) for arg in args)
    if origin is Literal:
        return " or ".join(f"`{value(arg)}`" for arg in args)
    if origin is tuple and args[-1] is Ellipsis:
        return f"list of {shown(args[0])}"
    if origin is tuple:
        return f"list of {len(args)}: {', '.join(map(shown, args))}"
    if origin is dict:
        return f"mapping of {shown(args[0])} to {shown(args[1])}"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    if hint is type(None):
        return "null"
    return names.get(hint) or SAID.get(hint) or f"[{hint.__name__}](#{hint.__name__.lower()})"


SAID = {
    spec: f"[{title.lower().removesuffix('s')}](#{title.lower()})" for title, _, spec in FAMILIES
}


def value(default: Any) -> str:
    """A default as YAML on one line."""
    if isinstance(default, Registered):
        default = {"kind": type(default).kind}
    elif dataclasses.is_dataclass(default):
        return "its defaults"
    if isinstance(default, float) and default == int(default) and abs(default) < 1e6:
        return f"{default:.1f}"
    text = yaml.safe_dump(_listed(default), default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...").replace("|", "\\|")


def _listed(default: Any) -> Any:
    return [_listed(one) for one in default] if isinstance(default, tuple) else default


def default_of(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{value(field.default_factory())}`"
    return "must be given" if field.default is dataclasses.MISSING else f"`{value(field.default)}`"


def table(
    cls: type, names: Iterable[str] | None = None, renamed: dict[str, str] | None = None
) -> str:
    """The fields of a dataclass as a Markdown table."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    _, said, _ = meanings(inspect.getdoc(cls) or "", fields)
    hints, renamed = field_types(cls), renamed or {}
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name in fields if names is None else names:
        told = said.get(name, "").replace("|", "\\|")
        cells = (f"`{renamed.get(name, name)}`", shown(hints[name]), default_of(fields[name]), told)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) if len(rows) > 2 else "It has no keys."


def summary_of(cls: type) -> str:
    """What a class says of itself before its fields, up to the first blank line."""
    before, *_ = meanings(inspect.getdoc(cls) or "", [f.name for f in dataclasses.fields(cls)])
    return " ".join(before.split("\n\n")[0].split())


def sections() -> list[str]:
    parts = [INTRO, table(ModelSpec)]
    for title, place, family in FAMILIES:
        parts.append(f"## {title}\n\nOne is {place}, and is chosen by `kind`.")
        for kind in sorted(family.registry):
            cls = family.registry[kind]
            plain = " `kind` may be left out." if kind == family.plain_kind else ""
            file = f" (`{cls.__module__.replace('.', '/')}.py`)"
            parts.append(f"### `{kind}`\n\n{summary_of(cls)}{plain}{file}\n\n{table(cls)}")
    parts.append(f"## RopeScaling\n\n{summary_of(RopeScaling)}\n\n{table(RopeScaling)}")
    config = yaml.safe_dump(nested(SearchConfig()), sort_keys=False)
    parts += [SPACE, SEARCH.format(config=config)]
    for section, names in SECTIONS.items():
        renamed = {names[0]: NAMED[section]} if section in NAMED else {}
        parts.append(f"### `{section}:`\n\n{table(SearchConfig, names, renamed)}")
    parts.append(f"And beside the sections:\n\n{table(SearchConfig, ('seed',))}")
    recipe = "`kizzasi.train.Recipe`: how one model is trained, by these arguments and no file."
    return [*parts, f"## A recipe\n\n{recipe}\n\n{table(Recipe)}"]


def page() -> str:
    return "\n\n".join(part.strip() for part in sections()) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
