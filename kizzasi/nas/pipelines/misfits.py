"""What does not fit in a document: where, by which rule, and what to change.

A document is plain data (mappings, lists, numbers, texts). A path is "arch.pos.rope.dims" or
"arch.pipeline[2].mode"; a change sets what is at a path, or with DROP takes it away.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any, Final

from kizzasi.errors import SpecError


class Drop:
    """The one value of a change that takes a key away."""

    def __repr__(self) -> str:
        return "nothing"


DROP: Final = Drop()


@dataclass(frozen=True)
class Misfit:
    """A rule that a document breaks.

    Args:
        path: of the field.
        rule: what was given, and why it does not do.
        remedy: what to change.
        changes: (path, value) that make the nearest valid document; () if only its author knows.
    """

    path: str
    rule: str
    remedy: str
    changes: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        text = f"{self.rule}; {self.remedy}" if self.remedy else self.rule
        return f"{self.path}: {text}" if self.path else text


class Findings(list[Misfit]):
    """Misfits in the order they were found, each place and rule once."""

    def add(self, path: str, rule: str, remedy: str, *changes: tuple[str, Any]) -> None:
        found = Misfit(path, rule, remedy, changes)
        if found not in self:
            self.append(found)

    def set(self, path: str, rule: str, value: Any, remedy: str = "") -> Any:
        """A misfit whose remedy is another value there, which is returned."""
        self.add(path, rule, remedy or f"give {_show(value)}", (path, value))
        return value

    def drop(self, path: str, rule: str, remedy: str = "leave it out") -> None:
        """A misfit whose remedy is to leave the field out."""
        self.add(path, rule, remedy, (path, DROP))

    def require_none(self) -> None:
        """Raises SpecError that names the misfits, one a line."""
        if self:
            raise SpecError("\n".join(map(str, self)))


def changed(document: Any, path: str, value: Any) -> Any:
    """A copy of a document with one change made; where a mapping on the way is missing, it is
    made, and where dropping leaves an empty one, it stays."""
    document = copy.deepcopy(document)
    *way, last = steps(path)
    place: Any = document
    for step, following in zip(way, [*way, last][1:], strict=True):
        if isinstance(place, dict) and place.get(step) is None:
            place[step] = [] if isinstance(following, int) else {}
        place = place[step]
    if value is not DROP:
        place[last] = value
    else:
        place.pop(*([last] if isinstance(place, list) else [last, None]))
    return document


def found_at(document: Any, path: str) -> Any:
    """What is at a path; None where there is nothing."""
    for step in steps(path):
        inside = step in document if isinstance(document, dict) else isinstance(document, list)
        if not inside:
            return None
        document = document[step]
    return document


def steps(path: str) -> list[str | int]:
    """Keys and positions, outermost first. A key may not hold a dot or bracket."""
    found = re.findall(r"\[(\d+)\]|([^.\[\]]+)", path)
    return [int(number) if number else name for number, name in found]


def describe_change(document: Any, path: str, value: Any) -> str:
    """One change in words."""
    before = found_at(document, path)
    if value is DROP:
        return f"{path}: {_show(before)} left out"
    return f"{path}: {_show(value)}" + ("" if before is None else f", was {_show(before)}")


def _show(value: Any) -> str:
    text = f"{value:,.0f}" if isinstance(value, float) and value >= 1e6 else repr(value)
    return text if len(text) < 80 else text[:77] + "..."
