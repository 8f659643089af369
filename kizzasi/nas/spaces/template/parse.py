"""Templates: model specs with holes; `ModelSpace` searches among the ways to fill these.

A template is the plain data of `ModelSpec.to_dict`, in Python, JSON or YAML, where any value may
be a hole:

    choice: [a, b, ...]      one of the options, each a template with holes of its own
    repeat: a                a list of `low` to `high` copies of a, each filled on its own
      low: 1
      high: 6
    pattern: mma             blocks tiled over the depth, as in `ModelSpec`; each letter is filled
      n_layers: 12           once, and pattern and n_layers may be holes
      letters: {m: ..., a: ...}

A list inside a list is spliced into it. A hole of one option asks nothing.

gene = the number of the option taken at a hole. Its path is where it stands in the filled model,
with ":i" behind a choice that took option i: "blocks[2].mixer:1.d_state". The depth of a repeat is
the gene of its own path. Genes of parts that were not chosen do not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kizzasi.documents import cut
from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ChannelSpec, MixerSpec, ModelSpec
from kizzasi.models.spec import MAX_LAYERS
from kizzasi.nas.spaces.template.nodes import (
    Block,
    Choice,
    Leaf,
    List,
    Model,
    Node,
    Part,
    Pattern,
    Record,
    Repeat,
    Walk,
    cover,
    every,
)
from kizzasi.strict import Strict, coerce, field_types, join, require, unknown_name

MOST_OPTIONS = 1000  # of a hole


def choice(*options: Any) -> dict[str, Any]:
    """A hole for one of `options`, templates themselves."""
    return {"choice": list(options)}


def repeat(block: Any, low: int, high: int) -> dict[str, Any]:
    """A hole for low to high copies of `block`, each filled on its own."""
    return {"repeat": block, "low": low, "high": high}


def pattern(*texts: str, n_layers: Any, **letters: Any) -> dict[str, Any]:
    """A hole for blocks tiled over the depth by one of `texts`, one block template per letter.

    `n_layers` may be a hole. Layers of one letter are alike.
    """
    return {"pattern": choice(*texts), "n_layers": n_layers, "letters": letters}


def parse(template: Any) -> Node:
    """Read a template of a model. Raises SpecError with the path of what is malformed."""
    return _model(plain(template), "")


def plain(data: Any) -> Any:
    """Specs and tuples as plain data; keys in order, so that equal templates draw alike."""
    if isinstance(data, Strict):
        return data.to_dict()
    if isinstance(data, Mapping):
        return {key: plain(data[key]) for key in sorted(data, key=str)}
    return [plain(value) for value in data] if isinstance(data, (list, tuple)) else data


def named(keys: Iterable[object]) -> list[str]:
    """Keys of any type, in order, for a message."""
    return sorted(cut(key).strip("'") for key in keys)


def _hole(data: Any, path: str, read: Callable[[Any, str], Node]) -> Node | None:
    """The hole at this place, whose content `read` reads; None if there is none."""
    if not isinstance(data, dict) or not data.keys() & {"choice", "repeat"}:
        return None
    if "choice" in data:
        require(data.keys() == {"choice"}, path, f"{named(data)}: choice stands alone")
        options = data["choice"]
        require(isinstance(options, list), path, f"choice: expected a list, got {cut(options)}")
        require(len(options) > 0, path, "choice: no options; give at least one")
        require(len(options) <= MOST_OPTIONS, path, f"choice: more than {MOST_OPTIONS} options")
        for i, option in enumerate(options):
            if any(type(o) is type(option) and o == option for o in options[:i]):
                raise SpecError(
                    f"{path}: choice: {cut(option)} occurs twice; give each option once"
                )
        return Choice([read(option, f"{path}:{i}") for i, option in enumerate(options)])
    keys = {"repeat", "low", "high"}
    require(data.keys() == keys, path, f"{named(data)}: a repeat has the keys {sorted(keys)}")
    low, high = (coerce(data[key], int, join(path, key)) for key in ("low", "high"))
    require(1 <= low <= high, path, f"repeat: {low} to {high} copies; needs 1 <= low <= high")
    require(high <= MAX_LAYERS, path, f"repeat: more than {MAX_LAYERS} layers")
    return Repeat(read(data["repeat"], f"{path}[]"), low, high)


def _value(data: Any, path: str) -> Node:
    """A template of anything."""
    if hole := _hole(data, path, _value):
        return hole
    if isinstance(data, dict):
        return Record({key: _value(value, join(path, key)) for key, value in data.items()})
    if isinstance(data, list):
        return List([_value(value, f"{path}[{i}]") for i, value in enumerate(data)])
    return Leaf(data)


def _model(data: Any, path: str) -> Node:
    """A template of a model."""
    if hole := _hole(data, path, _model):
        require(not isinstance(hole, Repeat), path, "repeat: a space has one model at a time")
        return hole
    require(isinstance(data, dict), path, f"expected a mapping, got {cut(data)}")
    require("blocks" in data, join(path, "blocks"), "missing; give a list of blocks")
    frame = Record({k: _value(v, join(path, k)) for k, v in data.items() if k != "blocks"})
    for values in cover(frame):
        ModelSpec.from_dict({**values, "blocks": []}, path)
    return Model(frame, _blocks(data["blocks"], join(path, "blocks")))


def _blocks(data: Any, path: str) -> Node:
    """A template of one or more blocks."""
    if hole := _hole(data, path, _blocks):
        return hole
    if isinstance(data, list):
        require(len(data) > 0, path, "empty; give at least one block")
        return List([_blocks(value, f"{path}[{i}]") for i, value in enumerate(data)])
    require(isinstance(data, dict), path, f"expected blocks, got {cut(data)}")
    return _pattern(data, path) if "pattern" in data else _block(data, path)


def _block(data: dict[str, Any], path: str) -> Node:
    hints = field_types(BlockSpec)
    for key in data:
        require(key in hints, join(path, key), unknown_name(key, hints))
    require("mixer" in data, join(path, "mixer"), "missing; give a mixer")
    nodes: dict[str, Node] = {}
    for key, value in data.items():
        place = join(path, key)
        node = _value(value, place)
        for filling in cover(node):
            coerce(filling, hints[key], place)
        family = {"mixer": MixerSpec, "channel": ChannelSpec}.get(key)
        nodes[key] = Part(family, node) if family else node
    return Block(Record(nodes))


def _pattern(data: dict[str, Any], path: str) -> Node:
    keys = {"pattern", "n_layers", "letters"}
    require(data.keys() == keys, path, f"{named(data)}: a pattern has the keys {sorted(keys)}")
    letters = data["letters"]
    require(isinstance(letters, dict), join(path, "letters"), "expected a mapping of blocks")
    text, depth = (_value(data[key], join(path, key)) for key in ("pattern", "n_layers"))
    texts: dict[str, None] = {}
    for filled in every(lambda decide: Record({"p": text, "n": depth}).fill("", Walk(decide))):
        word = coerce(filled["p"], str, join(path, "pattern"))
        n = coerce(filled["n"], int, join(path, "n_layers"))
        require(word != "", join(path, "pattern"), "empty; give at least one letter")
        require(n >= 1, join(path, "n_layers"), f"{n} is not positive; give at least 1")
        require(n <= MAX_LAYERS, join(path, "n_layers"), f"more than {MAX_LAYERS} layers")
        require(len(texts) <= MOST_OPTIONS, path, f"more than {MOST_OPTIONS} ways to tile")
        texts[(word * n)[:n]] = None
    used = set("".join(texts))
    require(used <= letters.keys(), path, f"no block given for {sorted(used - letters.keys())}")
    require(used >= letters.keys(), path, f"letters {named(letters.keys() - used)} do not occur")
    return Pattern(list(texts), {c: _blocks(letters[c], f"{path}.{c}") for c in letters})
