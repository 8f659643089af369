"""Optimisers that see losses only, as pure functions of an explicit state: init, ask, tell.

All of them run R independent problems side by side: restarts of one model, or parameters that touch
separate parts of a loss. What an optimiser asks next is a function of its state alone; its random
numbers are hashed from (seed, problem, counter), so they are the same on any device and for any
batch.

Glossary:
    R, P, n    problems, candidates per problem, parameters per problem
    x          (R, n) the current point
    best       (R) its loss
    used       evaluations so far, per problem
    sigma      size of a step or of the search distribution
    g          estimated gradient
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from kizzasi.errors import SpecError


class Optimizer(Protocol):
    """What `minimize` needs. States are NamedTuples with at least `x`, `best` and `used`.

    residuals      whether it is told residuals (R, P, m), whose mean square is the loss, or losses
    speculative    whether it may be told of the first few candidates only
    """

    residuals: ClassVar[bool]
    speculative: ClassVar[bool]

    def init(self, x: Tensor, loss: Tensor, /, seed: int, evaluations: int) -> Any:
        """Start from points (R, n) whose losses (R) are known; `evaluations` is the budget."""
        ...

    def ask(self, state: Any, /) -> Tensor:
        """Return (R, P, n) candidates; P = 0 ends the search."""
        ...

    def tell(self, state: Any, candidates: Tensor, losses: Tensor, /) -> Any:
        """Return the state after the candidates' losses (R, P); nan and inf count as bad."""
        ...

    def renew(self, state: Any, loss: Tensor, /) -> Any:
        """Return the state for another objective, on which the points `x` have these losses."""
        ...


def _mix(bits: Tensor) -> Tensor:
    """Scramble int64 numbers: the finaliser of splitmix64, with logical shifts."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        bits = (bits ^ ((bits >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return bits ^ ((bits >> 31) & ((1 << 33) - 1))


def hashed_uniform(seed: int, *counters: Tensor) -> Tensor:
    """Return float64 numbers in [0, 1), one per combination of the broadcast int64 counters.

    Any integer is a seed; it is taken modulo 2^64.
    """
    signed = (seed + 2**63) % 2**64 - 2**63
    bits = torch.tensor(signed, dtype=torch.int64, device=counters[0].device)
    for counter in counters:
        bits = _mix(bits * 0x5851F42D4C957F2D + counter + 1)
    return ((bits >> 11) & ((1 << 53) - 1)).double() / 2.0**53


def hashed_normal(seed: int, *counters: Tensor) -> Tensor:
    """Return standard normal numbers (Box-Muller), one per combination of counters.

    They are rounded to float32, where the last bits of logarithm and cosine do not show.
    """
    radius = torch.sqrt(-2.0 * torch.log1p(-hashed_uniform(seed, *counters)))
    return (radius * torch.cos(2.0 * math.pi * hashed_uniform(seed + 1, *counters))).float()


def hashed_noise(seed: int, step: int, count: int, x: Tensor) -> Tensor:
    """Return (R, count, n) standard normals for one iteration."""
    problems, width = (torch.arange(size, device=x.device) for size in x.shape)
    draws = torch.arange(count, device=x.device) + step * count
    return hashed_normal(seed, problems[:, None, None], draws[:, None], width).to(x.dtype)


def usable(losses: Tensor) -> Tensor:
    return torch.where(losses.isfinite(), losses, torch.inf)


def keep_best(
    x: Tensor, best: Tensor, candidates: Tensor, losses: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x and best after candidates with usable losses, and where those were better."""
    low, where = losses.min(1)
    better = low < best
    chosen = candidates[torch.arange(len(low), device=low.device), where]
    return torch.where(better[:, None], chosen, x), torch.where(better, low, best), better


def require(rule: bool, message: str) -> None:
    if not rule:
        raise SpecError(message)


def sweep_block(seed: int, at: int, block: int, x: Tensor) -> Tensor:
    """Return step `at`'s coordinates: a slice of a random order of all n, new for every sweep."""
    n = x.shape[1]
    block = min(block, n)
    sweep, part = divmod(at, math.ceil(n / block))
    keys = torch.arange(n, device=x.device)
    order = hashed_uniform(seed, torch.full_like(keys, sweep), keys).argsort()
    return order[part * block : (part + 1) * block]
