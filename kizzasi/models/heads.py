"""Heads: what is read from the features, as data. A model has its stem's own head, or those named.

Symbols: b batch, t time, d d_model, n outputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kizzasi.errors import SpecError
from kizzasi.models.cost import Cost, linear
from kizzasi.models.init import linear_
from kizzasi.strict import Registered, join, register, require

Pool = Literal["last", "mean"]


class Head(nn.Module):
    """A Linear on the features: of every token, of the last, or of the mean over a row's tokens."""

    roles: ClassVar[Mapping[str, Literal["embedding", "head"]]] = {"proj.weight": "head"}

    def __init__(self, d_model: int, n_out: int, pool: Pool | None) -> None:
        super().__init__()
        self.pool = pool
        self.proj = nn.Linear(d_model, n_out)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(b, t, d) to (b, t, n), or with a pool to (b, n); in a step (b, d) to (b, n).

        mask: (b, t), False for padding, which must come first.
        """
        if x.ndim == 2 or self.pool is None:
            return self.proj(x)
        if self.pool == "last":
            return self.proj(x[:, -1])
        if mask is None:
            return self.proj(x.mean(1))
        real = mask.bool().unsqueeze(-1)
        total = torch.where(real, x, 0.0).sum(1)
        return self.proj(total / real.sum(1).clamp(min=1).to(x.dtype))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        linear_(self.proj, generator)


class HeadSpec(Registered):
    """Base of head specs; each has a `name`, under which `ModelOutput.heads` holds its outputs."""

    registry: ClassVar[dict[str, type]] = {}
    name: str
    pool: Pool | None = None

    @abstractmethod
    def check(self, path: str) -> None:
        """Raise SpecError for every rule that the fields break."""

    @abstractmethod
    def build(self, d_model: int) -> Head | None:
        """The module; None for the stem's own."""

    @abstractmethod
    def cost(self, d_model: int, seq_len: int, batch: int) -> Cost: ...


@register
@dataclass(frozen=True)
class Own(HeadSpec):
    """The stem's own head: logits over its vocabulary, or predicted frames. Others beside it share
    the features.

    Args:
        name: under which `ModelOutput.heads` holds what it says.
    """

    kind: ClassVar[str] = "own"
    name: str = "own"

    def check(self, path: str) -> None: ...

    def build(self, d_model: int) -> None:
        return None

    def cost(self, d_model: int, seq_len: int, batch: int) -> Cost:
        return Cost()  # counted with the stem


class _LinearHead(HeadSpec):
    @abstractmethod
    def width(self) -> int: ...

    def build(self, d_model: int) -> Head:
        return Head(d_model, self.width(), self.pool)

    def cost(self, d_model: int, seq_len: int, batch: int) -> Cost:
        n_read = batch * (seq_len if self.pool is None else 1)
        return linear(n_read, d_model, self.width(), bias=True)


@register
@dataclass(frozen=True)
class Classes(_LinearHead):
    """Logits over classes: one answer a sequence, or with pool None one a token (tagging).

    Args:
        n_classes: how many, at least 2.
        pool: the features it reads: the last token's, or their mean; None: every token's.
        name: under which `ModelOutput.heads` holds what it says.
    """

    kind: ClassVar[str] = "classes"
    n_classes: int
    pool: Pool | None = "last"
    name: str = "classes"

    def check(self, path: str) -> None:
        require(self.n_classes >= 2, join(path, "n_classes"), f"{self.n_classes} is below 2")

    def width(self) -> int:
        return self.n_classes


@register
@dataclass(frozen=True)
class Regression(_LinearHead):
    """n_out real numbers for every token, or with a pool for the sequence.

    Args:
        n_out: how many.
        pool: the features it reads: the last token's, or their mean; None: every token's.
        name: under which `ModelOutput.heads` holds what it says.
    """

    kind: ClassVar[str] = "regression"
    n_out: int
    pool: Pool | None = None
    name: str = "regression"

    def check(self, path: str) -> None:
        self.require_positive(path, "n_out")

    def width(self) -> int:
        return self.n_out


def refuse_pooled(heads: Sequence[HeadSpec], state: bool, packed: bool) -> None:
    """Raise SpecError for a head that reads a whole row, where a call holds more or less."""
    for i, head in enumerate(heads):
        if packed and head.pool is not None:
            raise SpecError(
                f"heads[{i}]: {head.name!r} gives one answer a row, which segment_ids make several "
                "documents; give a row to each"
            )
        if state and head.pool == "mean":
            raise SpecError(
                f"heads[{i}]: {head.name!r} reads the mean of a whole sequence, which rules out a "
                'step and a carried state; give whole sequences, or choose the pool "last"'
            )
