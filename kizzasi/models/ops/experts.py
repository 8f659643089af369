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
In a graph and on the meta device "sorted" is one node, which runs the same code. All have second
derivatives but that node: use engine="reference" for those of a compiled model. One token alone,
without gradients, visits its experts one after the other: nothing is sorted.

Forward and backward of the whole layer, times the equal-FLOP dense SwiGLU; median of 9 by
scripts/bench_moe.py --threads 1 --cpu-time, torch 2.13, a busy Xeon, float32:

    n, d, h, e, k            sorted  grouped  masked  transformers' eager loop
    2048, 256, 128, 64, 4     1.5     1.7      3.1     5.6
    2048, 256, 512, 8, 2      1.05    1.2      1.1     1.2
    256, 256, 256, 16, 2      2.0     2.0      2.6     5.0

Symbols: n tokens, m jobs, e experts, d width, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kizzasi.models.ops.autodiff import gradients, too_narrow, transformed
from kizzasi.models.ops.devices import on_cuda
from kizzasi.models.ops.routing import Assignments

Expert = Callable[[Tensor], Tensor]
ALIGNMENT = 8  # its rows must be multiples of so many bfloat16
BLOCK_ROWS = 1024  # jobs that "sorted" takes at once, in whole experts


def dispatch_rule(x: Tensor, down: Tensor | None) -> str:
    """The written rule behind every engine but "reference"; see the module.

    down: of packed experts, if they are.
    """
    traced = torch.compiler.is_compiling()
    if (traced and down is None) or (not traced and transformed()):
        return "dense"
    if down is None or not on_cuda(x):
        return "sorted"
    low = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    aligned = low == torch.bfloat16 and not any(n % ALIGNMENT for n in down.shape[1:])
    return "grouped" if aligned else "sorted"


def mix(x: Tensor, to: Assignments, experts: Sequence[Expert], how: str) -> Tensor:
    """Send tokens to any callables.

    Args:
        x: (n, d).
        to: the jobs.
        experts: each maps (m, d) to (m, d_out) for any m >= 0.
        how: "masked", "sorted" or "dense".

    Returns:
        (n, d_out), in x's dtype.
    """
    if how != "sorted":
        return (_masked if how == "masked" else _dense)(x, to, experts)
    order, counts = sort_by_expert(to, len(experts))
    sizes = counts.tolist()
    jobs = order[: sum(sizes)]
    token = to.token[jobs]
    groups = zip(experts, x[token].split(sizes), strict=True)
    out = torch.cat([expert(rows) for expert, rows in groups])
    wide = out * to.weight[jobs, None]
    return wide.new_zeros(len(x), out.shape[1]).index_add(0, token, wide).to(x.dtype)


def mix_one(x: Tensor, to: Assignments, experts: Callable[[int], Expert], n: int) -> Tensor:
    """`mix` for a single token, x (1, d), without gradients; experts(i) is the i-th of n."""
    y = None
    for i, weight in zip(to.expert.tolist(), to.weight.unbind(), strict=True):
        if 0 <= i < n:
            part = experts(i)(x) * weight
            y = part if y is None else y + part
    return torch.zeros_like(x) if y is None else y.to(x.dtype)


def mix_swiglu(x: Tensor, to: Assignments, gate_up: Tensor, down: Tensor, how: str) -> Tensor:
    """Send tokens to packed SwiGLU experts: down(silu(gate x) * up x).

    Under autocast the products are taken in the autocast dtype.

    Args:
        x: (n, d).
        to: the jobs.
        gate_up, down: see the module.
        how: any of the four.

    Returns:
        (n, d), in x's dtype.
    """
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return mix_swiglu(x.to(dtype), to, gate_up, down, how).to(x.dtype)
    if how in ("masked", "dense"):
        pairs = zip(gate_up.unbind(), down.unbind(), strict=True)
        return mix(x, to, [swiglu(*pair) for pair in pairs], how)
    order, counts = sort_by_expert(to, len(down))
    token, weight = to.token[order], to.weight[order]
    if how == "sorted":
        if torch.compiler.is_compiling() or x.is_meta:
            return _node(x, weight, token, counts, gate_up, down)[0].to(x.dtype)
        return _Sorted.apply(x, weight, token, counts, gate_up, down)  # pyright: ignore
    wide = _grouped(x, token, counts, gate_up, down) * weight[:, None]
    return wide.new_zeros(x.shape).index_add(0, token, wide).to(x.dtype)


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


def _forward(
    x: Tensor, weight: Tensor, token: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    """Blocks of a few experts, on rows that stay in the cache; plain autograd writes every gathered
    row, result and gradient to memory once more. Gathers and elementwise work are done for a block
    at once, for each call has its price.

    Args:
        x: (n, d).
        weight, token: (m,), sorted by expert; those behind counts.sum() are of nobody.
        counts: (e,) int64.
        gate_up, down: as above, of x's dtype or another.

    Returns:
        (n, d) in weight's dtype, and (2, m, h) what the gates and the ups gave.
    """
    y, both = _results(x, weight, token, down)
    gates, ups, downs = _each(gate_up, down)
    for rows, busy, sizes in _blocks(counts):
        jobs, (a, c) = token[rows], both[:, rows]
        block = x.index_select(0, jobs)
        each = block.split(sizes)
        for i, x_i, a_i, c_i in zip(busy, each, a.split(sizes), c.split(sizes), strict=True):
            torch.mm(x_i, gates[i].to(x.dtype).T, out=a_i)
            torch.mm(x_i, ups[i].to(x.dtype).T, out=c_i)
        hidden = F.silu(a).mul_(c).mul_(weight[rows, None])
        for i, hidden_i, y_i in zip(busy, hidden.split(sizes), each, strict=True):
            torch.mm(hidden_i, downs[i].to(x.dtype).T, out=y_i)  # the block's x is done with
        y.index_add_(0, jobs, block.to(y.dtype))
    return y, both


def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    token: Tensor,
    counts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    both: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, gate_up and down; arguments as in and from `_forward`, grad_y in x's
    dtype."""
    grad_x, grad_weight = torch.zeros_like(x, dtype=weight.dtype), torch.zeros_like(weight)
    grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
    gates, ups, downs = _each(gate_up, down)
    grad_gates, grad_ups, grad_downs = _each(grad_gate_up, grad_down)
    for rows, busy, sizes in _blocks(counts):
        jobs, w, (a, c) = token[rows], weight[rows, None], both[:, rows]
        block, grad = x.index_select(0, jobs), grad_y.index_select(0, jobs)
        grads, grad_hidden = grad.split(sizes), torch.empty_like(a)
        for i, grad_i, out in zip(busy, grads, grad_hidden.split(sizes), strict=True):
            torch.mm(grad_i, downs[i].to(x.dtype), out=out)
        silu = F.silu(a)
        hidden = silu * c
        grad_weight[rows] = (grad_hidden * hidden).sum(-1, dtype=weight.dtype)
        hidden.mul_(w)
        grad_hidden.mul_(w)
        grad_up = silu.mul_(grad_hidden)
        grad_gate = torch.ops.aten.silu_backward(grad_hidden.mul_(c), a)
        parts = [v.split(sizes) for v in (block, hidden, grad_gate, grad_up)]
        for i, grad_i, x_i, hidden_i, a_i, c_i in zip(busy, grads, *parts, strict=True):
            _product(grad_i.T, hidden_i, grad_downs[i])
            _product(a_i.T, x_i, grad_gates[i])
            _product(c_i.T, x_i, grad_ups[i])
            torch.mm(a_i, gates[i].to(x.dtype), out=x_i).addmm_(c_i, ups[i].to(x.dtype))
        grad_x.index_add_(0, jobs, block.to(grad_x.dtype))
    for i, count in enumerate(counts.tolist()):
        if not count:
            grad_gate_up[i].zero_()
            grad_down[i].zero_()
    return grad_x.to(x.dtype), grad_weight, grad_gate_up, grad_down


def _each(gate_up: Tensor, down: Tensor) -> tuple[Sequence[Tensor], ...]:
    """Gates, ups and downs by expert, as views."""
    return *(part.unbind() for part in gate_up.chunk(2, dim=1)), down.unbind()


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:  # under autocast
        out.copy_(a @ b)


def _results(x: Tensor, weight: Tensor, token: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Room for what `_forward` returns."""
    return torch.zeros_like(x, dtype=weight.dtype), x.new_empty(2, len(token), down.shape[2])


def _blocks(counts: Tensor) -> Iterator[tuple[slice, list[int], list[int]]]:
    """Runs of experts with BLOCK_ROWS jobs or more, the last run perhaps fewer: the rows of all,
    the indices of those that have jobs, and how many each has."""
    start = end = 0
    busy: list[int] = []
    each = counts.tolist()
    for i, count in enumerate(each):
        end += count
        if count:
            busy.append(i)
        if busy and (end - start >= BLOCK_ROWS or i == len(each) - 1):
            yield slice(start, end), busy, [each[j] for j in busy]
            start, busy = end, []


class _Sorted(torch.autograd.Function):
    """`_forward` with `_backward` as its gradient, which has one too: that of "dense"."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:  # pyright: ignore
        y, both = _forward(x, *others)
        ctx.save_for_backward(x, *others, both)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:  # pyright: ignore
        x, weight, token, counts, gate_up, down, both = ctx.saved_tensors
        if too_narrow(grad_y):
            return gradients(_plain, (x, weight, token, counts, gate_up, down), (grad_y,))
        dx, dw, *others = _backward(grad_y, x, weight, token, counts, gate_up, down, both)
        return dx, dw, None, None, *others


def _plain(
    x: Tensor, weight: Tensor, token: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """What `_forward` returns first, by plain operations."""
    place = torch.arange(len(token), device=x.device)
    expert = torch.searchsorted(counts.cumsum(0), place, right=True)
    return mix_swiglu(x, Assignments(token, expert, weight), gate_up, down, "dense")


# A graph holds "sorted" as one node, which runs the same code.
_node = torch.library.custom_op("kizzasi::mix_swiglu", _forward, mutates_args=())
_node_backward = torch.library.custom_op("kizzasi::mix_swiglu_backward", _backward, mutates_args=())


@_node.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, weight, token, _, _, down = arguments
    return _results(x, weight, token, down)


@_node_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    _, x, weight, _, _, gate_up, down, _ = arguments
    return tuple(torch.empty_like(v) for v in (x, weight, gate_up, down))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, *others = ctx.saved_tensors
    dx, dw, dg, dd = _node_backward(grad_y.to(x.dtype), x, *others)
    return dx, dw, None, None, dg, dd


_node.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.kizzasi.mix_swiglu)
def _(x: Any, weight: Any, token: Any, counts: Any, gate_up: Any, down: Any, **_: Any) -> int:
    """If no job is idle; the arguments are shapes."""
    return 2 * token[0] * 3 * down[1] * down[2]


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
