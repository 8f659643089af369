"""From logits to a token: penalties, the user's own rule, filters, one draw.

Symbols: b rows, t tokens of a row so far, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import TypeAlias, TypeGuard

import torch
from torch import Tensor

from kizzasi.errors import GenerateError
from kizzasi.models.ops.precision import full_precision

Process: TypeAlias = Callable[[Tensor, Tensor], Tensor]
DRAWN_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen; `generate` explains the fields."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    process: Process | None = None

    def check(self) -> None:
        """Raise GenerateError for a field out of range."""
        top_k, top_p, min_p = self.top_k, self.top_p, self.min_p
        require(number(self.temperature) and self.temperature >= 0, "temperature", "at least 0")
        require(top_k is None or (integer(top_k) and top_k >= 1), "top_k", "an integer from 1 on")
        require(top_p is None or (number(top_p) and 0 < top_p <= 1), "top_p", "in (0, 1]")
        require(min_p is None or (number(min_p) and 0 <= min_p <= 1), "min_p", "in [0, 1]")
        penalty = self.repetition_penalty
        require(number(penalty) and penalty > 0, "repetition_penalty", "above 0")

    def logits(self, logits: Tensor, seen: Seen) -> Tensor:
        """(b, v) in at least float32: the penalty first, then the user's own rule."""
        logits = seen.penalize(full_precision(logits))
        if self.process is None or seen.ids is None:
            return logits
        made = self.process(seen.ids, logits)
        if not isinstance(made, Tensor) or made.shape != logits.shape:
            got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise GenerateError(
                f"process: returned {got} for logits {tuple(logits.shape)}; return logits of "
                "the same shape"
            )
        return made

    def probabilities(self, logits: Tensor) -> Tensor:
        """The (b, v) distribution that a token is drawn from: one-hot at temperature 0."""
        if self.temperature > 0:
            return sampled_from(logits, self.temperature, self.top_k, self.top_p, self.min_p)
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, best, 1.0)

    def pick(self, logits: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Choose one id per row of the logits (b, v) that `logits` made.

        Returns:
            (b,) int64 ids, and (b,) bool, False where NaN or infinite logits left nothing to
            choose from and the id means nothing.
        """
        if self.temperature == 0:
            best, ids = logits.max(-1)
            return ids, best.abs() < torch.inf
        return invert(self.probabilities(logits), draws.next())


@dataclass(frozen=True)
class Seen:
    """The tokens that each row holds so far, and the penalty on saying them again.

    A value: `add` and `gather` make another one, so that it forks as a state does.

    ids    (b, t) prompts, padding included, and continuations; None if nobody reads them.
    said   (b, v) bool, which tokens a row holds, its padding aside; None without a penalty.
    """

    penalty: float
    ids: Tensor | None
    said: Tensor | None

    @classmethod
    def begin(cls, sampling: Sampling, rows: Tensor, mask: Tensor | None, v: int) -> Seen:
        """The prompts (b, t); mask (b, t) is False at padding."""
        said = None
        if sampling.repetition_penalty != 1:
            # Padding is said as id v, which is cut off again.
            heard = rows if mask is None else rows.masked_fill(~mask.bool(), v)
            said = torch.zeros(len(rows), v + 1, dtype=torch.bool, device=rows.device)
            said = said.scatter_(1, heard, True)[:, :v]
        return cls(sampling.repetition_penalty, rows if sampling.process else None, said)

    def add(self, ids: Tensor) -> Seen:
        """One more token (b,) of each row."""
        if self.ids is None and self.said is None:
            return self
        said = None if self.said is None else self.said.scatter(1, ids[:, None], True)
        rows = None if self.ids is None else torch.cat([self.ids, ids[:, None]], dim=1)
        return replace(self, ids=rows, said=said)

    def gather(self, rows: Tensor) -> Seen:
        """Rows by index."""
        said = None if self.said is None else self.said[rows]
        return replace(self, ids=None if self.ids is None else self.ids[rows], said=said)

    def penalize(self, logits: Tensor) -> Tensor:
        if self.said is None:
            return logits
        less = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return torch.where(self.said, less, logits)


class Draws:
    """Uniform numbers for one token after another, the same ones on every device.

    They are drawn on the generator's device and moved over many tokens at a time.

    Args:
        seed: of a generator of its own, or a generator, which is then advanced.
        rows: b.
        device: where they are used.
    """

    def __init__(self, seed: int | torch.Generator, rows: int, device: torch.device) -> None:
        own = isinstance(seed, torch.Generator)
        self.generator = seed if own else torch.Generator().manual_seed(seed)
        self.rows, self.device = rows, device
        self.drawn: list[Tensor] = []

    def next(self) -> Tensor:
        """(b,) float32 in [0, 1)."""
        if not self.drawn:
            shape, place = (DRAWN_AT_ONCE, self.rows), self.generator.device
            drawn = torch.rand(shape, generator=self.generator, device=place, dtype=torch.float32)
            self.drawn = list(drawn.to(self.device).flip(0).unbind())
        return self.drawn.pop()


def invert(p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The first id whose cumulative weight exceeds u of the whole.

    Args:
        p: (b, v) weights, which need not sum to 1.
        u: (b,) in [0, 1).

    Returns:
        (b,) int64 ids of positive weight, and (b,) bool, False where the weights are not finite.
    """
    total = p.cumsum(-1)
    whole = total[:, -1:]
    ids = torch.searchsorted(total, u[:, None].to(p.dtype) * whole, right=True)[:, 0]
    return ids.clamp(max=p.shape[-1] - 1), whole[:, 0].isfinite()


def sampled_from(
    logits: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """(b, v) probabilities; each filter works on what the one before it left, in the order of the
    arguments."""
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        floor = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        outside = p.cumsum(-1) - p >= top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    if min_p is not None:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < min_p * p.amax(-1, keepdim=True), -torch.inf)
    return logits.softmax(-1)


def require(ok: bool, name: str, rule: str) -> None:
    if not ok:
        raise GenerateError(f"{name}: must be {rule}")


def number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def integer(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)
