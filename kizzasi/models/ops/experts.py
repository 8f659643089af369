"""Five ways to send tokens to their experts and to bring the results back. All are equal.

    y[t] = sum over jobs j with token[j] = t of weight[j] * expert_{expert[j]}(x[t])

    masked    each expert picks its tokens with a mask: the definition
    sorted    jobs sorted by expert, one dense product per group
    grouped   jobs sorted by expert, one `grouped_mm` for all groups
    padded    groups padded to the longest, one batched product
    dense     every expert works on every token, e / k times the work

Sums over jobs are taken in at least float32. Every parameter of every expert gets a gradient, zero
where the expert had no job, so that data-parallel training never waits for one.

The rule (`choose_backend`): sorted, except grouped for bfloat16 on CUDA, where a loop over experts
would wait for the device and many small kernels would not fill it (not measured here: no GPU).
One token alone, in decoding, visits its experts one after the other: nothing is sorted.
While a graph is traced (torch.compile, torch.export) the rule is dense: only there do no shapes
depend on how many tokens an expert has.

Forward and backward of the whole layer, times the equal-FLOP dense SwiGLU; median of 15 by
scripts/bench_moe.py --threads 1 --cpu-time, torch 2.13, a busy Xeon, float32 unless named:

    n, d, h, e, k            sorted  grouped  padded  masked  transformers' eager loop
    2048, 256, 128, 64, 4     2.0     2.2      2.6     5.0     14
    2048, 256, 512, 8, 2      1.3     1.4      1.4     1.5     1.8
    256, 256, 256, 16, 2      2.2     2.5      3.6     3.6     11
    first row in bfloat16     1.6     1.6      1.6     2.7     4.2

Symbols: n tokens, m jobs, e experts, d width, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kizzasi.errors import SpecError
from kizzasi.models.ops.routing import Assignments

Expert = Callable[[Tensor], Tensor]
GROUPED_MM = getattr(F, "grouped_mm", None)  # public since torch 2.10
ALIGNMENT_BYTES = 16  # of every row that grouped_mm reads
BLOCK_ROWS = 1024  # jobs that "sorted" takes at once, in whole experts


class SwiGLUWeights(NamedTuple):
    """down(silu(gate x) * up x), one matrix per expert: gate, up (h, d) and down (d, h)."""

    gate: Sequence[Tensor]
    up: Sequence[Tensor]
    down: Sequence[Tensor]


def choose_backend(device: torch.device, dtype: torch.dtype, stackable: bool) -> str:
    """The written rule behind backend="torch"; the module's docstring has the measurements."""
    if torch.compiler.is_compiling():
        return "dense"
    bfloat16_on_cuda = stackable and device.type == "cuda" and dtype == torch.bfloat16
    return "grouped" if bfloat16_on_cuda and GROUPED_MM is not None else "sorted"


def mix(x: Tensor, to: Assignments, experts: Sequence[Expert], backend: str) -> Tensor:
    """Send tokens to any callables.

    Args:
        x: (n, d).
        to: the jobs.
        experts: each maps (m, d) to (m, d_out) for any m >= 0.
        backend: "masked", "sorted" or "dense".

    Returns:
        (n, d_out), in x's dtype.

    Raises:
        SpecError: a backend that only SwiGLU experts of one width have.
    """
    if backend in ("masked", "dense"):
        return (_masked if backend == "masked" else _dense)(x, to, experts)
    if backend != "sorted":
        raise SpecError(
            f"backend: {backend!r} stacks weights, so it needs plain SwiGLU experts of one width; "
            'use "sorted" or "masked" for these experts'
        )
    order, counts = sort_by_expert(to, len(experts))
    token = to.token[order]
    groups = zip(experts, x[token].split(counts.tolist()), strict=True)
    out = torch.cat([expert(rows) for expert, rows in groups])
    wide = out * to.weight[order, None]
    return wide.new_zeros(x.shape[0], out.shape[1]).index_add(0, token, wide).to(x.dtype)


def mix_one(x: Tensor, to: Assignments, experts: Sequence[Expert]) -> Tensor:
    """`mix` for a single token, x (1, d), without gradients."""
    y = None
    for job, i in enumerate(to.expert.tolist()):
        if 0 <= i < len(experts):
            part = experts[i](x) * to.weight[job, None]
            y = part if y is None else y + part
    return torch.zeros_like(x) if y is None else y.to(x.dtype)


def mix_swiglu(x: Tensor, to: Assignments, weights: SwiGLUWeights, backend: str) -> Tensor:
    """Send tokens to SwiGLU experts; arguments as in `mix`, with all five backends.

    Under autocast the products are taken in the autocast dtype.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        cast = SwiGLUWeights(*([w.to(dtype) for w in part] for part in weights))
        with torch.autocast(x.device.type, enabled=False):
            return mix_swiglu(x.to(dtype), to, cast, backend).to(x.dtype)
    if backend in ("masked", "dense"):
        return mix(x, to, [_swiglu(*one) for one in zip(*weights, strict=True)], backend)
    order, counts = sort_by_expert(to, len(weights.gate), keep_idle=backend == "grouped")
    token, weight = to.token[order], to.weight[order]
    if backend == "sorted":
        flat = [w for part in weights for w in part]
        return _SortedSwiGLU.apply(x, weight, token, counts.tolist(), *flat)  # pyright: ignore[reportReturnType]
    out = (_grouped if backend == "grouped" else _padded)(x, token, counts, weights)
    wide = out * weight[:, None]
    return wide.new_zeros(x.shape).index_add(0, token, wide).to(x.dtype)


def sort_by_expert(
    to: Assignments, n_experts: int, *, keep_idle: bool = False
) -> tuple[Tensor, Tensor]:
    """Jobs in the order of their experts.

    Returns:
        (m,) indices of jobs, without those of nobody (`keep_idle` leaves them at the end, and so
        does not wait for the device), and (e,) int64, how many jobs each expert has.
    """
    idle = (to.expert < 0) | (to.expert >= n_experts)
    key = torch.where(idle, n_experts, to.expert)
    counts = torch.zeros(n_experts + 1, dtype=torch.int64, device=key.device)
    counts = counts.index_add(0, key, torch.ones_like(key))[:-1]
    order = key.argsort(stable=True)
    return order if keep_idle else order[: int(counts.sum())], counts


def _swiglu(gate: Tensor, up: Tensor, down: Tensor) -> Expert:
    return lambda x: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _masked(x: Tensor, to: Assignments, experts: Sequence[Expert]) -> Tensor:
    y = None
    for i, expert in enumerate(experts):
        jobs = (to.expert == i).nonzero()[:, 0]
        wide = expert(x[to.token[jobs]]) * to.weight[jobs, None]
        part = wide.new_zeros(len(x), wide.shape[1]).index_add(0, to.token[jobs], wide)
        y = part if y is None else y + part
    assert y is not None, "no experts"
    return y.to(x.dtype)


def _dense(x: Tensor, to: Assignments, experts: Sequence[Expert]) -> Tensor:
    """The weights of all jobs as a table (n, e), mostly zeros."""
    idle = (to.expert < 0) | (to.expert >= len(experts))
    place = torch.where(idle, 0, to.token * len(experts) + to.expert)
    table = to.weight.new_zeros(len(x) * len(experts))
    table = table.index_add(0, place, torch.where(idle, 0, to.weight)).view(len(x), -1)
    parts = [expert(x) * table[:, i, None] for i, expert in enumerate(experts)]
    return torch.stack(parts).sum(0).to(x.dtype)


class _SortedSwiGLU(torch.autograd.Function):
    """Blocks of a few experts, forward and backward, on rows that stay in the cache.

    Plain autograd writes every gathered row, result and gradient to memory once more. Gathers and
    elementwise work are done for a block at once, for each call has its price. The gradients of a
    part of all experts are views of one tensor: many small ones go back to the system at the next
    zero_grad, and their pages must be faulted in again. Once differentiable.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, weight: Tensor, token: Tensor, counts: list[int], *flat: Tensor
    ) -> Tensor:
        gates, ups, downs = _split_parts(flat)
        y = torch.zeros_like(x, dtype=weight.dtype)
        a, c = (x.new_empty(len(token), len(gates[0])) for _ in range(2))
        for rows, busy, sizes in _blocks(counts):
            jobs, a_block, c_block = token[rows], a[rows], c[rows]
            block = x.index_select(0, jobs)
            parts = [t.split(sizes) for t in (block, a_block, c_block)]
            for i, x_i, a_i, c_i in zip(busy, *parts, strict=True):
                torch.mm(x_i, gates[i].T, out=a_i)
                torch.mm(x_i, ups[i].T, out=c_i)
            hidden = F.silu(a_block).mul_(c_block).mul_(weight[rows, None])
            for i, hidden_i, y_i in zip(busy, hidden.split(sizes), parts[0], strict=True):
                torch.mm(hidden_i, downs[i].T, out=y_i)  # the block's x is done with
            y.index_add_(0, jobs, block.to(y.dtype))
        ctx.counts = counts
        ctx.save_for_backward(x, weight, token, a, c, *flat)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, token, a_all, c_all, *flat = ctx.saved_tensors
        gates, ups, downs = _split_parts(flat)
        grad_x = torch.zeros_like(x, dtype=weight.dtype)
        grad_weight = torch.empty_like(weight)
        stacks = [p[0].new_empty(len(p), *p[0].shape).unbind() for p in (gates, ups, downs)]
        grad_gates, grad_ups, grad_downs = stacks
        for rows, busy, sizes in _blocks(ctx.counts):
            jobs, w, a, c = token[rows], weight[rows, None], a_all[rows], c_all[rows]
            block, grad = x.index_select(0, jobs), grad_y.index_select(0, jobs)
            grads, grad_hidden = grad.split(sizes), torch.empty_like(a)
            for i, grad_i, out in zip(busy, grads, grad_hidden.split(sizes), strict=True):
                torch.mm(grad_i, downs[i], out=out)
            silu = F.silu(a)
            hidden = silu * c
            grad_weight[rows] = (grad_hidden * hidden).sum(-1, dtype=weight.dtype)
            hidden.mul_(w)
            grad_hidden.mul_(w)
            grad_c = silu.mul_(grad_hidden)
            grad_a = torch.ops.aten.silu_backward(grad_hidden.mul_(c), a)
            parts = [t.split(sizes) for t in (block, hidden, grad_a, grad_c)]
            for i, grad_i, x_i, hidden_i, a_i, c_i in zip(busy, grads, *parts, strict=True):
                torch.mm(grad_i.T, hidden_i, out=grad_downs[i])
                torch.mm(a_i.T, x_i, out=grad_gates[i])
                torch.mm(c_i.T, x_i, out=grad_ups[i])
                torch.mm(a_i, gates[i], out=x_i).addmm_(c_i, ups[i])
            grad_x.index_add_(0, jobs, block.to(grad_x.dtype))
        for i, count in enumerate(ctx.counts):
            if not count:
                for part in stacks:
                    part[i].zero_()
        full = (g for part in stacks for g in part)
        return grad_x.to(x.dtype), grad_weight, None, None, *full


def _split_parts(flat: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
    n = len(flat) // 3
    return flat[:n], flat[n : 2 * n], flat[2 * n :]


def _blocks(counts: list[int]) -> Iterator[tuple[slice, list[int], list[int]]]:
    """Runs of experts with BLOCK_ROWS jobs or more, the last run perhaps fewer: the rows of all,
    the indices of those that have jobs, and how many each has."""
    start = end = 0
    busy: list[int] = []
    for i, count in enumerate(counts):
        end += count
        if count:
            busy.append(i)
        if busy and (end - start >= BLOCK_ROWS or i == len(counts) - 1):
            yield slice(start, end), busy, [counts[j] for j in busy]
            start, busy = end, []


def _padded(x: Tensor, token: Tensor, counts: Tensor, weights: SwiGLUWeights) -> Tensor:
    """Sorted jobs in a block (e, longest group, d), then three batched products."""
    longest = int(counts.max())
    expert = torch.arange(len(counts), device=x.device).repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    slot = torch.arange(len(token), device=x.device) - first[expert] + expert * longest
    block = x.new_zeros(len(counts) * longest, x.shape[1]).index_copy(0, slot, x[token])
    block = block.unflatten(0, (len(counts), longest))
    gate, up, down = (torch.stack(tuple(part)).mT for part in weights)
    return ((F.silu(block @ gate) * (block @ up)) @ down).flatten(0, 1)[slot]


def _grouped(x: Tensor, token: Tensor, counts: Tensor, weights: SwiGLUWeights) -> Tensor:
    """Sorted jobs through three grouped products. Rows of idle jobs, at the end, are zero."""
    gate, up, down = (torch.stack(tuple(part)) for part in weights)
    ends = counts.cumsum(0).int()
    # The kernel leaves idle rows unwritten, in the result and in the gradient: mask on both sides.
    busy = (torch.arange(len(token), device=x.device) < ends[-1])[:, None]
    rows = torch.where(busy, x[token], 0)
    hidden = F.silu(grouped_linear(rows, gate, ends)) * grouped_linear(rows, up, ends)
    hidden = torch.where(busy, hidden, 0)
    return torch.where(busy, grouped_linear(hidden, down, ends), 0)


def grouped_linear(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """y[j] = weights[i] x[j] for every row j of group i, by `torch.nn.functional.grouped_mm`.

    Rows are padded with zeros to 16 bytes, and gradients made contiguous: the kernel takes neither
    other strides nor expanded tensors. Where there is no kernel (float64; float32 and float16 on
    CUDA; float32 inside torch.compile; torch before 2.10) the groups are multiplied one by one.

    Args:
        x: (m, n_in), rows sorted by group.
        weights: (e, n_out, n_in), in x's dtype.
        ends: (e,) int32, where each group ends. Rows behind the last one come out arbitrary.

    Returns:
        (m, n_out).
    """
    if not _has_kernel(x):
        ends_list = ends.tolist()
        sizes = [b - a for a, b in zip([0, *ends_list], [*ends_list, len(x)], strict=True)]
        *groups, behind = x.split(sizes)
        parts = [F.linear(rows, w) for rows, w in zip(groups, weights.unbind(0), strict=True)]
        return torch.cat([*parts, behind.new_zeros(len(behind), weights.shape[1])])
    assert GROUPED_MM is not None
    n_out, n_in = weights.shape[1:]
    step = ALIGNMENT_BYTES // x.element_size()
    if n_in % step or n_out % step:
        x = F.pad(x, (0, -n_in % step))
        weights = F.pad(weights, (0, -n_in % step, 0, -n_out % step))
    y = GROUPED_MM(x, weights.mT, offs=ends)
    if y.requires_grad:
        y.register_hook(Tensor.contiguous)
    return y[:, :n_out]


def _has_kernel(x: Tensor) -> bool:
    """Where grouped_mm was seen to work, or is documented to."""
    if GROUPED_MM is None or (torch.compiler.is_compiling() and x.dtype != torch.bfloat16):
        return False
    if x.device.type == "cpu":
        return x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return x.dtype == torch.bfloat16
