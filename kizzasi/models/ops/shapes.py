"""Whether the arguments of an op fit each other, said once per op and by letter."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kizzasi.errors import ShapeError


class _Dim(NamedTuple):
    """A size by its letter, less a number; `or_one`: or 1, which broadcasts."""

    letter: str
    less: int
    or_one: bool


class Shapes:
    """How an op's arguments are shaped.

        SHAPES = Shapes(q="b t h n", v="b t h m", w="b|1 t|1 h|1 n|1", state="b h n m")
        b, t, h, n, m = SHAPES(q, v, w, state)

    A letter is settled where it first stands alone, so what the others are held against comes
    first; "n|1" is n or 1, and "k-1" one less than k. Sequences, t, have a token at least.
    """

    def __init__(self, **arguments: str) -> None:
        self.arguments = {
            name: tuple(_dim(dim) for dim in shape.split()) for name, shape in arguments.items()
        }
        self.written = {name: f"({', '.join(shape.split())})" for name, shape in arguments.items()}

    def __call__(self, *given: Tensor | None) -> tuple[int, ...]:
        """The sizes, in the order in which their letters first stand. None fits anything.

        Raises:
            ShapeError: one argument does not fit those before it.
        """
        sizes: dict[str, int] = {}
        for (name, dims), x in zip(self.arguments.items(), given, strict=True):
            if x is not None and not _fits(tuple(x.shape), dims, sizes):
                known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items())
                rule = f"expected {self.written[name]} with t >= 1" + (known and f", {known}")
                raise ShapeError(f"{name} is {tuple(x.shape)}; {rule}")
        return tuple(sizes.values())


def _dim(text: str) -> _Dim:
    letter, _, other = text.partition("|")
    letter, _, less = letter.partition("-")
    return _Dim(letter, int(less or 0), other == "1")


def _fits(shape: tuple[int, ...], dims: tuple[_Dim, ...], sizes: dict[str, int]) -> bool:
    """Whether a shape is as said. Letters that were free become settled if it is."""
    if len(shape) != len(dims):
        return False
    found = dict(sizes)
    for (letter, less, or_one), size in zip(dims, shape, strict=True):
        if letter not in found and not less:
            found[letter] = size
            if letter == "t" and size < 1:
                return False
        elif size != found[letter] - less and not (or_one and size == 1):
            return False
    sizes.update(found)
    return True
