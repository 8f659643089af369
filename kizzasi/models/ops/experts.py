"""Sending tokens to their experts and bringing the results back.

    y[t] = sum over jobs j with token[j] = t of weight[j] * expert_{expert[j]}(x[t])

    masked    each expert picks its tokens with a mask: the definition
    sorted    jobs sorted by expert, one dense product per group
    grouped   jobs sorted by expert, one `grouped_mm` for all groups
    dense     every expert works on every token, e / k times the work

All are equal. Sums over jobs are taken in at least float32. Every parameter of every expert gets a
gradient, zero where the expert had no job, so that data-parallel training never waits for one.

SwiGLU experts of one width are packed: gate_up (e, 2h, d), gates first, and down (e, d, h). Slices
of them are read, so no weight is copied; autocast casts the experts that have jobs, or, for
"grouped", all of them.

The rule (`dispatch_rule`) is sorted, except
    grouped   packed bfloat16 on CUDA whose widths are multiples of 8, where a loop over experts
              would wait for the device and many small kernels would not fill it (not measured
              here: no GPU)
    dense     inside torch.func, and of experts that are not packed in a graph (torch.compile,
              torch.export): only there do no shapes depend on how many tokens an expert has
    alone     one token without gradients visits its experts one after the other
In a graph and on the meta device "sorted" is one node. All have second derivatives but that node:
use engine="reference" for those of a compiled model.

Forward and backward of the whole layer, times the equal-FLOP dense SwiGLU: scripts/bench_moe.py.

Symbols: n tokens, m jobs, e experts, d width, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.ops.autodiff import transformed
from kizzasi.models.ops.devices import on_cuda
from kizzasi.models.ops.routing import Assignments
from kizzasi.models.ops.sorted_experts import MIX_SORTED, mix_sorted_node

Expert = Callable[[Tensor], Tensor]
ALIGNMENT = 8  # its rows must be multiples of so many bfloat16


def dispatch_rule(x: Tensor, down: Tensor | None, engine: str = "auto") -> str:
    """The written rule; see the module. The engine "reference" is "masked".

    down: of packed experts, if they are.
    """
    traced = torch.compiler.is_compiling()
    if engine == "reference":
        return "masked"
    if (traced and down is None) or (not traced and transformed()):
        return "dense"
    if down is not None and on_cuda(x):
        low = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        if low == torch.bfloat16 and not any(n % ALIGNMENT for n in down.shape[1:]):
            return "grouped"
    alone = not traced and not torch.is_grad_enabled() and len(x) == 1
    return "alone" if alone else "sorted"


def mix(x: Tensor, to: Assignments, experts: Sequence[Expert], how: str) -> Tensor:
    """Send tokens to any callables.

    Args:
        x: (n, d).
        to: the jobs.
        experts: each maps (m, d) to (m, d_out) for any m >= 0.
        how: any of `dispatch_rule` but "grouped".

    Returns:
        (n, d_out), in x's dtype.
    """
    if how == "alone":
        return mix_one(x, to, experts.__getitem__, len(experts))
    if how != "sorted":
        return (_masked if how == "masked" else _dense)(x, to, experts)
    order, counts = sort_by_expert(to, len(experts))
    sizes = counts.tolist()
    jobs = order[: sum(sizes)]
    token = to.token[jobs]
    groups = zip(experts, x[token].split(sizes), strict=True)
    out = torch.cat([expert(rows) for expert, rows in groups])
    return combine(out, token, to.weight[jobs], x)


def combine(out: Tensor, token: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """(n, d_out) in the dtype of x (n, d): the results (m, d_out) of jobs, weighted and summed by
    token."""
    wide = out * weight[:, None]
    return wide.new_zeros(len(x), out.shape[1]).index_add(0, token, wide).to(x.dtype)


def mix_one(x: Tensor, to: Assignments, experts: Callable[[int], Expert], n: int) -> Tensor:
    """`mix` for a single token, x (1, d), without gradients; experts(i) is the i-th of n."""
    y = None
    for i, weight in zip(to.expert.tolist(), to.weight.unbind(), strict=True):
        if 0 <= i < n:
            part = experts(i)(x) * weight
            y = part if y is None else y + part
    return torch.zeros_like(x) if y is None else y.to(x.dtype)


def mix_swiglu(
    x: Tensor, to: Assignments, gate_up: Tensor, down: Tensor, how: str, engine: str = "auto"
) -> Tensor:
    """Send tokens to packed SwiGLU experts: down(silu(gate x) * up x).

    Under autocast the products are taken in the autocast dtype.

    Args:
        x: (n, d).
        to: the jobs.
        gate_up, down: see the module.
        how: any of `dispatch_rule`.
        engine: of "sorted"; see `MIX_SORTED`.

    Returns:
        (n, d), in x's dtype.
    """
    kind = x.device.type
    if how == "alone":
        return mix_one(x, to, lambda i: swiglu(gate_up[i], down[i]), len(down))
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return mix_swiglu(x.to(dtype), to, gate_up, down, how, engine).to(x.dtype)
    if how in ("masked", "dense"):
        pairs = zip(gate_up.unbind(), down.unbind(), strict=True)
        return mix(x, to, [swiglu(*pair) for pair in pairs], how)
    order, counts = sort_by_expert(to, len(down))
    token, weight = (v.index_select(0, order) for v in (to.token, to.weight))  # index_put is slow
    if how == "grouped":
        return combine(_grouped(x, token, counts, gate_up, down), token, weight, x)
    if x.is_meta:  # without values, a job is as another's
        return combine(swiglu(gate_up[0], down[0])(x.index_select(0, token)), token, weight, x)
    if torch.compiler.is_compiling():
        return mix_sorted_node(x, weight, token, counts, gate_up, down)[0].to(x.dtype)
    return MIX_SORTED.pick(engine, x.device)(x, weight, token, counts, gate_up, down)


def sort_by_expert(to: Assignments, n_experts: int) -> tuple[Tensor, Tensor]:
    """(m,) indices of jobs in the order of their experts, those of nobody at the end, and (e,)
    int64, how many jobs each expert has."""
    idle = (to.expert < 0) | (to.expert >= n_experts)
    key = torch.where(idle, n_experts, to.expert)
    counts = torch.zeros(n_experts + 1, dtype=torch.int64, device=key.device)
    counts = counts.index_add(0, key, torch.ones_like(key))[:-1]
    return key.argsort(stable=True), counts


def swiglu(gate_up: Tensor, down: Tensor) -> Expert:
    """One expert: gate_up (2h, d), down (d, h)."""

    def call(x: Tensor) -> Tensor:
        gate, up = F.linear(x, gate_up.to(x.dtype)).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down.to(x.dtype))

    return call


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


def _grouped(x: Tensor, token: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Sorted jobs through two grouped products. Rows of idle jobs, at the end, are zero."""
    ends = counts.cumsum(0).int()
    # The kernel leaves idle rows unwritten, in the result and in the gradient: mask on both sides.
    busy = (torch.arange(len(token), device=x.device) < ends[-1])[:, None]
    gate, up = _grouped_linear(torch.where(busy, x[token], 0), gate_up, ends).chunk(2, dim=1)
    hidden = torch.where(busy, F.silu(gate) * up, 0)
    return torch.where(busy, _grouped_linear(hidden, down, ends), 0)


def _grouped_linear(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """y[j] = weights[i] x[j] for every row j of group i; rows behind the last come out arbitrary.

    Args:
        x: (m, n_in), rows sorted by group.
        weights: (e, n_out, n_in).
        ends: (e,) int32, where each group ends.
    """
    y = F.grouped_mm(x, weights.to(x.dtype).mT, offs=ends)
    if y.requires_grad:
        y.register_hook(Tensor.contiguous)  # the kernel takes no expanded gradients
    return y
