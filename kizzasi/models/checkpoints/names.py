"""Names of tensors in another layout, and the rewriting between the two: rules, read both ways.

    Rule("blocks.#.mixer.q_proj.@", "model.layers.#.self_attn.q_proj.@")

"#" stands for a number and "@" for the last part of a name, such as weight or bias; both mean the
same on either side. "*" gathers: it stands for 0, 1, 2, ... as far as our model has tensors.

A rule whose tensors are not equal has a `Form`: two inverse functions on lists of tensors. Forms
work on meta tensors too, which is how the shapes wanted of a file follow from a spec.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kizzasi.errors import CheckpointError


class Form(NamedTuple):
    """How tensors are rewritten; read undoes write exactly.

    write  our tensors to theirs.
    read   their tensors, and the shapes of ours, to our tensors.
    """

    write: Callable[[list[Tensor]], list[Tensor]]
    read: Callable[[list[Tensor], list[torch.Size]], list[Tensor]]


def _fuse(dim: int, transposed: bool) -> Form:
    def write(ours: list[Tensor]) -> list[Tensor]:
        return [torch.cat([t.mT for t in ours] if transposed else ours, dim=dim)]

    def read(theirs: list[Tensor], shapes: list[torch.Size]) -> list[Tensor]:
        sizes = [shape[::-1][dim] if transposed else shape[dim] for shape in shapes]
        parts = theirs[0].split(sizes, dim=dim)
        return [part.mT for part in parts] if transposed else list(parts)

    return Form(write, read)


SAME = Form(lambda ours: ours, lambda theirs, shapes: theirs)
TRANSPOSED = Form(lambda ours: [t.mT for t in ours], lambda theirs, shapes: [t.mT for t in theirs])
CONCATENATED = _fuse(0, transposed=False)  # ours, one after another along the first dimension
CONCATENATED_TRANSPOSED = _fuse(1, transposed=True)  # the same, then transposed
STACKED = Form(
    lambda ours: [torch.stack(ours)],
    lambda theirs, shapes: list(theirs[0].unbind()),
)


def reshaped(*shape: int) -> Form:
    """Theirs is ours in another shape, which may hold one -1: reshaped(1, 1, -1)."""
    return Form(
        lambda ours: [t.reshape(shape) for t in ours],
        lambda theirs, shapes: [t.reshape(s) for t, s in zip(theirs, shapes, strict=True)],
    )


def interleaved(width: int) -> Form:
    """Rows of heads of this width: theirs turn pairs (2i, 2i + 1), ours (i, i + width / 2)."""

    def exchange(tensors: list[Tensor], *pair: int) -> list[Tensor]:
        return [t.unflatten(0, (-1, *pair)).transpose(1, 2).flatten(0, 2) for t in tensors]

    return Form(
        lambda ours: exchange(ours, 2, width // 2),
        lambda theirs, shapes: exchange(theirs, width // 2, 2),
    )


class Rule(NamedTuple):
    """Some of our tensors, and those of theirs that hold the same numbers. See the module."""

    ours: str | Sequence[str]
    theirs: str | Sequence[str]
    form: Form = SAME


class Link(NamedTuple):
    """A rule applied: names without placeholders."""

    ours: list[str]
    theirs: list[str]
    form: Form


def renamed(table: Mapping[str, str]) -> list[Rule]:
    """One rule per pair of names, tensors unchanged."""
    return [Rule(ours, theirs) for ours, theirs in table.items()]


def apply(rules: Iterable[Rule], names: Sequence[str]) -> list[Link]:
    """Every rule on every tensor of ours that it fits; each of our names must be met once.

    Args:
        rules: may speak of tensors that this model has not.
        names: of all our tensors.

    Raises:
        CheckpointError: a tensor that no rule speaks of.
    """
    links: dict[str, Link] = {}
    left = set(names)
    for rule in rules:
        ours = [rule.ours] if isinstance(rule.ours, str) else list(rule.ours)
        theirs = [rule.theirs] if isinstance(rule.theirs, str) else list(rule.theirs)
        first = re.compile(_pattern(ours[0]))
        for name in names:
            match = first.fullmatch(name)
            if match is None or name not in left:
                continue
            link = Link(
                [n for text in ours for n in _gather(_fill(text, match), left)],
                [_fill(text, match) for text in theirs],
                rule.form,
            )
            left -= set(link.ours)
            links[name] = link
    if left:
        raise CheckpointError(f"the format has no name for {', '.join(sorted(left)[:3])}")
    return list(links.values())


def written(links: Sequence[Link], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names and in their form."""
    theirs: dict[str, Tensor] = {}
    for link in links:
        tensors = link.form.write([ours[name] for name in link.ours])
        theirs |= zip(link.theirs, tensors, strict=True)
    return theirs


def _pattern(text: str) -> str:
    """Numbers as groups 1, 2, ..., the last part as the group "leaf"; "*" starts at 0."""
    text = re.escape(text).replace(r"\#", r"(\d+)")
    return text.replace("@", r"(?P<leaf>[^.]+)").replace(r"\*", "0")


def _fill(text: str, match: re.Match[str]) -> str:
    groups = match.groupdict()
    numbers = iter(match.groups()[: len(match.groups()) - len(groups)])
    text = re.sub("#", lambda _: next(numbers), text)
    return text.replace("@", groups.get("leaf", ""))


def _gather(text: str, names: set[str]) -> list[str]:
    found: list[str] = []
    while "*" in text and (name := text.replace("*", str(len(found)))) in names:
        found.append(name)
    return found or [text]
