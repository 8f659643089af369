"""Exact EML trees: nested eml(., .) over 1 and variables, evaluated and written out.

    S -> 1 | variable | eml(S, S),      eml(x, y) = exp(x) - ln(y)

Equal subtrees are one object, so evaluation costs one operation per distinct node. Intermediates
are complex (the principal logarithm) and may be infinite: ln 0 = -inf and exp(-inf) = 0 hold.

Glossary (Odrzywolek 2026, arXiv:2603.21852):
    size K     nodes of the tree, leaves included: the length of its reverse Polish form
    depth      nested operators on the longest path
    distinct   nodes after sharing equal subtrees
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from kizzasi.errors import ShapeError, SpecError


@dataclass(frozen=True, eq=False)
class Tree:
    """A leaf (name "1" or a variable, no children) or eml(left, right). Made by `leaf` and `node`,
    which return the same object for the same tree."""

    name: str
    left: Tree | None = field(repr=False, default=None)
    right: Tree | None = field(repr=False, default=None)
    size: int = 1
    depth: int = 0

    @property
    def children(self) -> tuple[Tree, Tree] | None:
        return None if self.left is None or self.right is None else (self.left, self.right)

    @property
    def distinct(self) -> int:
        """Nodes after sharing."""
        return len(topological(self))

    def __str__(self) -> str:
        """Write the tree out; see `formula` for a readable form."""
        return _write(self, _plainly)


@cache
def leaf(name: str) -> Tree:
    """Return the leaf "1" or a variable's."""
    return Tree(name)


@cache
def node(left: Tree, right: Tree) -> Tree:
    """Return eml(left, right)."""
    size, depth = left.size + right.size + 1, max(left.depth, right.depth) + 1
    return Tree("eml", left, right, size, depth)


_MOST_PIECES = 1_000_000
ONE = leaf("1")
E = node(ONE, ONE)


def topological(tree: Tree) -> list[Tree]:
    """List the distinct nodes, children first."""
    order: dict[Tree, None] = {}
    stack = [(tree, False)]
    while stack:
        at, expanded = stack.pop()
        if at in order:
            continue
        children = at.children
        if expanded or children is None:
            order[at] = None
        else:
            stack += [(at, True), (children[0], False), (children[1], False)]
    return list(order)


def complex_eml(x: Tensor, y: Tensor) -> Tensor:
    """Compute exp(x) - ln(y) on complex128 over the extended reals.

    exp(inf + 0i) is inf, where the textbook product inf * (cos 0 + i sin 0) would give nan.
    """
    radius, angle = torch.exp(x.real), x.imag
    straight = angle == 0
    real = torch.where(straight, radius, radius * torch.cos(angle))
    imaginary = torch.where(straight, 0.0, radius * torch.sin(angle))
    log = torch.complex(torch.log(y.abs()), torch.where(y == 0, 0.0, y.angle()))
    return torch.complex(real - log.real, imaginary - log.imag)


def evaluate(tree: Tree, variables: Mapping[str, Tensor]) -> Tensor:
    """Evaluate a tree on complex128.

    Args:
        tree: its leaves name the variables.
        variables: tensors of one shape, real or complex.

    Returns:
        complex128 of that shape. On real problems the imaginary part is rounding noise.

    Raises:
        SpecError: a variable is missing.
        ShapeError: variables of different shapes.
    """
    if len({value.shape for value in variables.values()}) > 1:
        shapes = {name: tuple(value.shape) for name, value in variables.items()}
        raise ShapeError(f"variables have shapes {shapes}; they must have one")
    example = next(iter(variables.values()), torch.ones(()))
    values = {ONE: torch.ones_like(example, dtype=torch.complex128)}
    for at in topological(tree):
        children = at.children
        if children:
            values[at] = complex_eml(values[children[0]], values[children[1]])
        elif at is not ONE:
            if at.name not in variables:
                raise SpecError(f"variable {at.name!r} has no value; given: {sorted(variables)}")
            values[at] = variables[at.name].to(torch.complex128)
    return values[tree]


def ln_argument(x: Tree) -> Tree | None:
    """Return u if x is ln u as `ln_of` writes it."""
    if x.left is ONE and x.right is not None:
        inner = x.right
        if inner.right is ONE and inner.left is not None and inner.left.left is ONE:
            return inner.left.right
    return None


def formula(tree: Tree) -> str:
    """Write a tree as a readable formula: eml(a, b) as exp(a) - ln(b), with exact simplifications.

    exp(1) - ln(1) is written e, exp(a) - ln(1) as exp(a), and `ln_of`'s form as ln(b).

    Raises:
        SpecError: equal subtrees, written out, make it longer than a million pieces.
    """
    return _write(tree, _readably)


Pieces = list["Tree | str"]


def _plainly(tree: Tree) -> Pieces:
    children = tree.children
    return ["eml(", children[0], ", ", children[1], ")"] if children else [tree.name]


def _readably(tree: Tree) -> Pieces:
    children = tree.children
    if children is None:
        return [tree.name]
    argument = ln_argument(tree)
    if argument is not None:
        return ["ln(", argument, ")"]
    left, right = children
    first: Pieces = ["e"] if left is ONE else ["exp(", left, ")"]
    return first if right is ONE else ["(", *first, " - ln(", right, "))"]


def _write(tree: Tree, pieces: Callable[[Tree], Pieces]) -> str:
    """Write a tree from left to right, however deep it is."""
    written: list[str] = []
    stack: Pieces = [tree]
    while stack:
        at = stack.pop()
        if isinstance(at, str):
            written.append(at)
        else:
            stack += reversed(pieces(at))
        if len(written) > _MOST_PIECES:
            raise SpecError(
                f"written out, this tree of {tree.size} nodes ({tree.distinct} distinct) is longer "
                f"than {_MOST_PIECES} pieces; evaluate it instead"
            )
    return "".join(written)


def samples_of(variables: Mapping[str, Tensor], target: Tensor) -> Tensor:
    """Return the samples as complex128 rows (V, S) after checking them.

    Raises:
        SpecError: no variable, or no sample.
        ShapeError: not all of one length S.
    """
    if not variables or not target.numel():
        raise SpecError("variables is empty or holds no sample; give at least one name, 8 samples")
    shapes = {name: tuple(value.shape) for name, value in variables.items()}
    if target.ndim != 1 or set(shapes.values()) != {tuple(target.shape)}:
        raise ShapeError(
            f"variables have shapes {shapes}, the target {tuple(target.shape)}; all must be (S,)"
        )
    return torch.stack([value.to(torch.complex128) for value in variables.values()])
