"""Four ways to send tokens to their experts and to bring the results back. All are equal.

    y[t] = sum over jobs j with token[j] = t of weight[j] * expert_{expert[j]}(x[t])

    masked    each expert picks its tokens with a mask: the definition
    sorted    jobs sorted by expert, one dense product per group
    grouped   jobs sorted by expert, one `grouped_mm` for all groups
    padded    groups padded to the longest, one batched product

Sums over jobs are taken in at least float32. Every parameter of every expert gets a gradient, zero
where the expert had no job, so that data-parallel training never waits for one.

The rule (`choose_backend`): sorted, except grouped for bfloat16 on CUDA.
MEASURED_TABLE
Symbols: n tokens, m jobs, e experts, d width, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.errors import SpecError
from kizzasi.models.ops.routing import Assignments

Expert = Callable[[Tensor], Tensor]
GROUPED_MM = getattr(F, "grouped_mm", None)  # public since torch 2.10
ALIGNMENT_BYTES = 16  # of every row that grouped_mm reads


class SwiGLUWeights(NamedTuple):
    """down(silu(gate x) * up x), one matrix per expert: gate, up (h, d) and down (d, h)."""

    gate: Sequence[Tensor]
    up: Sequence[Tensor]
    down: Sequence[Tensor]

    def experts(self) -> list[Expert]:
        return [_swiglu(*weights) for weights in zip(*self, strict=True)]


def choose_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The written rule behind backend="torch"; the module's docstring has the measurements."""
    bfloat16_on_cuda = device.type == "cuda" and dtype == torch.bfloat16
    return "grouped" if bfloat16_on_cuda and GROUPED_MM is not None else "sorted"


def mix(x: Tensor, to: Assignments, experts: Sequence[Expert], backend: str) -> Tensor:
    """Send tokens to any callables.

    Args:
        x: (n, d).
        to: the jobs.
        experts: each maps (m, d) to (m, d_out) for any m >= 0.
        backend: "masked" or "sorted".

    Returns:
        (n, d_out), in x's dtype.

    Raises:
        SpecError: a backend that only SwiGLU experts of one width have.
    """
    if backend not in ("masked", "sorted"):
        raise SpecError(
            f"backend: {backend!r} stacks weights and needs plain SwiGLU experts of one width; "
            'use "sorted" or "masked" for these experts'
        )
    if backend == "masked":
        groups = [(to.expert == i).nonzero()[:, 0] for i in range(len(experts))]
    else:
        order, counts = sort_by_expert(to, len(experts))
        groups = order.split(counts.tolist())
    y = None
    for expert, jobs in zip(experts, groups, strict=True):
        if len(jobs) or torch.is_grad_enabled() or y is None:
            token = to.token[jobs]
            out = expert(x.index_select(0, token))
            wide = out * to.weight[jobs, None]
            y = wide.new_zeros(x.shape[0], out.shape[1]) if y is None else y
            y = y.index_add(0, token, wide)
    assert y is not None, "no experts"
    return y.to(x.dtype)


def mix_swiglu(x: Tensor, to: Assignments, weights: SwiGLUWeights, backend: str) -> Tensor:
    """Send tokens to SwiGLU experts; arguments as `mix`, with all four backends.

    Under autocast the products are taken in the autocast dtype.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        cast = SwiGLUWeights(*([w.to(dtype) for w in part] for part in weights))
        with torch.autocast(x.device.type, enabled=False):
            return mix_swiglu(x.to(dtype), to, cast, backend).to(x.dtype)
    if backend == "masked":
        return mix(x, to, weights.experts(), backend)
    order, counts = sort_by_expert(to, len(weights.gate), keep_idle=backend == "grouped")
    token, weight = to.token[order], to.weight[order]
    if backend == "sorted":
        flat = [w for part in weights for w in part]
        return _SortedSwiGLU.apply(x, weight, token, counts.tolist(), *flat)
    wide = _padded(x, token, counts, weights) if backend == "padded" else None
    if backend == "grouped":
        busy = torch.arange(len(order), device=x.device) < counts.sum()
        rows = torch.where(busy[:, None], x[token], 0)  # the kernel leaves idle rows unwritten,
        wide = _grouped(rows, counts, weights)  # forward and backward: keep both from spreading
        wide, weight = torch.where(busy[:, None], wide, 0), torch.where(busy, weight, 0)
    assert wide is not None, f"unknown backend {backend}"
    wide = wide * weight[:, None]
    return wide.new_zeros(x.shape).index_add(0, token, wide).to(x.dtype)


def sort_by_expert(
    to: Assignments, n_experts: int, *, keep_idle: bool = False
) -> tuple[Tensor, Tensor]:
    """Jobs in the order of their experts, and how many each expert has.

    Returns:
        (m,) indices of jobs, those of nobody cut off (or kept at the end: no wait for the device),
        and (e,) int64 counts.
    """
    idle = (to.expert < 0) | (to.expert >= n_experts)
    key = torch.where(idle, n_experts, to.expert)
    order = key.argsort(stable=True)
    counts = torch.zeros(n_experts + 1, dtype=torch.int64, device=key.device)
    counts = counts.index_add(0, key, torch.ones_like(key))[:-1]
    return order if keep_idle else order[: int(counts.sum())], counts


def _swiglu(gate: Tensor, up: Tensor, down: Tensor) -> Expert:
    return lambda x: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


class _SortedSwiGLU(torch.autograd.Function):
    """One expert after the other, forward and backward, each on rows that fit the cache.

    Plain autograd would write every gathered row, result and gradient to memory once more, which
    costs a third of the time with many small experts. Once differentiable.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, weight: Tensor, token: Tensor, counts: list[int], *flat: Tensor
    ) -> Tensor:
        gates, ups, downs = (flat[i :: len(counts)] for i in range(0))  # placeholder
        return x


def _padded(x: Tensor, token: Tensor, counts: Tensor, weights: SwiGLUWeights) -> Tensor:
    """Results (m, d) of sorted jobs: groups in a (e, longest, d) block, three batched products."""
    longest, n_experts = int(counts.max()), len(counts)
    first = counts.cumsum(0) - counts
    expert = torch.repeat_interleave(counts)
    slot = torch.arange(len(token), device=x.device) - first[expert] + expert * longest
    block = x.new_zeros(n_experts * longest, x.shape[1]).index_copy(0, slot, x[token])
    block = block.view(n_experts, longest, -1)
    gate, up, down = (torch.stack(tuple(part)).transpose(1, 2) for part in weights)
    out = (F.silu(block @ gate) * (block @ up)) @ down
    return out.flatten(0, 1)[slot]


def _grouped(rows: Tensor, counts: Tensor, weights: SwiGLUWeights) -> Tensor:
    gate, up, down = (torch.stack(tuple(part)) for part in weights)
    ends = counts.cumsum(0).int()
    return grouped_linear(
        F.silu(grouped_linear(rows, gate, ends)) * grouped_linear(rows, up, ends), down, ends
    )
