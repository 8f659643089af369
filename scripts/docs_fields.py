"""What the docstring of a dataclass says of each of its fields."""

from __future__ import annotations

import re
from collections.abc import Iterable

ENDS = re.compile(r"^(?:\s*$|(?:Returns|Raises|Source|Differs):)", re.MULTILINE)


def meanings(doc: str, fields: Iterable[str]) -> tuple[str, dict[str, str], str]:
    """Split a docstring: what stands before its fields, the meaning of each, what stands behind.

    Fields stand under "Args:", or as a paragraph of lines "name: meaning"; several may share a
    line ("a, b: what both are") or follow one another on it ("a: this. b: that.").
    """
    name = "|".join(map(re.escape, fields))
    head, args, rest = doc.partition("Args:\n")
    text = rest if args else head
    starts = re.compile(rf"(?:^[ \t]*|(?<=[.;]) )((?:{name})(?:, (?:{name}))*): ", re.MULTILINE)
    first = starts.search(text) if name else None
    if first is None:
        return doc, {}, ""
    before = head if args else text[: first.start()]
    text = text[first.start() :]
    end = ENDS.search(text)
    text, after = (text[: end.start()], text[end.start() :]) if end else (text, "")
    found = {}
    _, *parts = starts.split(text)
    for names, meaning in zip(parts[::2], parts[1::2], strict=True):
        found |= dict.fromkeys(names.split(", "), " ".join(meaning.split()))
    return before.rstrip(), found, after.strip()
