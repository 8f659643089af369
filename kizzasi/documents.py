"""YAML and JSON from anywhere: bounded before anything is expanded, so that a small file stays one.

A file of 600 bytes can stand for 2^26 values (aliases of aliases), or for a number of a million
digits. Sizes are looked at first: of the file, of what its aliases expand to, of its numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kizzasi.errors import SpecError
from kizzasi.files import read_bytes

MOST_BYTES = 2**20
MOST_VALUES = 200_000  # aliases written out
MOST_DEPTH = 100
MOST_DIGITS = 400  # of a number
CUT = 80  # characters of a value in a message


def read_document(path: str | os.PathLike[str], what: str, loader: Any = None) -> Any:
    """The plain data in a file: JSON if its name ends in .json, else YAML.

    Args:
        path: a regular file of at most 1 MiB.
        what: it should be, for messages: "spec".
        loader: of PyYAML; the safe one if left out.

    Raises:
        SpecError: missing, no regular file, too large, or no YAML or JSON; names the file.
    """
    import yaml  # slow to import, and most programs read no document

    try:
        text = read_bytes(path, MOST_BYTES).decode("utf-8-sig")
        if Path(path).suffix == ".json":
            data = json.loads(text, parse_int=_whole)
            _require_shallow(data)
            return data
        return _yaml(text, loader or getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        reason = f"cannot read the {what}: {error.strerror}"
    except RecursionError:
        reason = "nested too deeply"
    except (ValueError, TypeError, OverflowError, LookupError, yaml.YAMLError) as error:
        kind = "JSON" if Path(path).suffix == ".json" else "YAML"
        reason = f"not {kind}: {' '.join(str(error).split()):.200}"
    raise SpecError(f"{path}: {reason}")


def _yaml(text: str, loader: Any) -> Any:
    reader = loader(text)
    try:
        if text.count("[") + text.count("{") + text.count("- ") > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values")
        node = reader.get_single_node()
        if node is None:
            return None
        _size(node, {}, 0)
        return reader.construct_document(node)
    finally:
        reader.dispose()


def _size(node: Any, known: dict[int, int], depth: int) -> int:
    """How many values a node is once its aliases are written out. Raises ValueError."""
    if depth > MOST_DEPTH:
        raise ValueError(f"nested more than {MOST_DEPTH} deep")
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias that contains itself")
        return known[id(node)]
    known[id(node)] = 0
    if isinstance(node.value, str):
        if len(node.value) > MOST_DIGITS and node.tag.rpartition(":")[2] in ("int", "float"):
            raise ValueError(f"a number of more than {MOST_DIGITS} digits")
        size = 1
    else:
        parts = [p for pair in node.value for p in (pair if isinstance(pair, tuple) else (pair,))]
        size = 1 + sum(_size(part, known, depth + 1) for part in parts)
    if size > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES:,} values, its aliases written out")
    known[id(node)] = size
    return size


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of more than {MOST_DIGITS} digits")
    return int(text)


def _require_shallow(data: Any, depth: int = 0) -> None:
    if depth > MOST_DEPTH:
        raise ValueError(f"nested more than {MOST_DEPTH} deep")
    parts = data.values() if isinstance(data, Mapping) else data if isinstance(data, list) else ()
    for part in parts:
        _require_shallow(part, depth + 1)


def cut(value: object) -> str:
    """A value as it stands in a message: the beginning of its repr, however large it is."""
    if isinstance(value, (list, tuple, Mapping)) and len(value) > CUT:
        return f"a {type(value).__name__} of {len(value):,}"
    if isinstance(value, int) and value.bit_length() > 4 * MOST_DIGITS:
        return f"a number of {value.bit_length():,} bits"
    return f"{value!r:.80}"
