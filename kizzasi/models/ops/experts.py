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
In a graph and on the meta device "sorted" is one node, which runs the torch form. All have second
derivatives but that node: use engine="reference" for those of a compiled model.

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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kizzasi.models.ops.autodiff import gradients, too_narrow, transformed
from kizzasi.models.ops.devices import on_cuda
from kizzasi.models.ops.engines import Engines
from kizzasi.models.ops.routing import Assignments

Expert = Callable[[Tensor], Tensor]
ALIGNMENT = 8  # its rows must be multiples of so many bfloat16
BLOCK_ROWS = 1024  # jobs that "sorted" takes at once, in whole experts


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
    token, weight = to.token[order], to.weight[order]
    if how == "grouped":
        return combine(_grouped(x, token, counts, gate_up, down), token, weight, x)
    if torch.compiler.is_compiling() or x.is_meta:
        return _node(x, weight, token, counts, gate_up, down)[0].to(x.dtype)
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


def mix_sorted_ref(
    x: Tensor, weight: Tensor, token: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Send tokens to packed SwiGLU experts, by jobs that are sorted by expert.

    Args:
        x: (n, d).
        weight, token: (m,), sorted by expert; those behind counts.sum() are of nobody.
        counts: (e,) int64, how many jobs each expert has.
        gate_up, down: see the module.

    Returns:
        (n, d), in x's dtype.
    """
    place = torch.arange(len(token), device=x.device)
    expert = torch.searchsorted(counts.cumsum(0), place, right=True)
    return mix_swiglu(x, Assignments(token, expert, weight), gate_up, down, "masked")


def mix_sorted(
    x: Tensor, weight: Tensor, token: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """`mix_sorted_ref`, one dense product per group."""
    return Sorted.apply(TORCH, x, weight, token, counts, gate_up, down)  # pyright: ignore


class Rows(NamedTuple):
    """The work on rows of jobs between the products.

    gate   (m, 2h) gates and ups, (m,) weights -> (m, h) weight silu(gate) up
    slope  the same and (m, h) the gradient of silu(gate) up weight, but for the weight
           -> what `gate` gives, and the gradients of its arguments
    add    y (n, d), (m,) tokens, (m, d) rows; adds the rows to y in place
    """

    gate: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    add: Callable[[Tensor, Tensor, Tensor], object]


def _gate(both: Tensor, weight: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=1)
    return F.silu(gate).mul_(up).mul_(weight[:, None])


def _slope(both: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = both.chunk(2, dim=1)
    silu, grad_both = F.silu(gate), torch.empty_like(both)
    hidden = silu * up
    grad_weight = (grad * hidden).sum(-1, dtype=weight.dtype)
    grad = grad * weight[:, None]
    grad_gate, grad_up = grad_both.chunk(2, dim=1)
    torch.mul(silu, grad, out=grad_up)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad.mul_(up), gate))
    return hidden.mul_(weight[:, None]), grad_both, grad_weight


TORCH = Rows(_gate, _slope, lambda y, token, rows: y.index_add_(0, token, rows.to(y.dtype)))


def forward(
    rows: Rows,
    x: Tensor,
    weight: Tensor,
    token: Tensor,
    counts: Tensor,
    gate_up: Tensor,
    down: Tensor,
) -> tuple[Tensor, Tensor]:
    """Blocks of a few experts, on rows that stay in the cache; plain autograd writes every gathered
    row, result and gradient to memory once more.

    Args:
        rows: see there.
        x, weight, token, counts, gate_up, down: as in `mix_sorted_ref`; x's dtype may be another
            than that of the matrices, which are then cast.

    Returns:
        (n, d) in weight's dtype, and (m, 2h) what the gates and the ups gave.
    """
    y, both = _results(x, weight, token, down)
    enter, leave = gate_up.unbind(), down.unbind()
    for here, busy, sizes in _blocks(counts):
        block = x.index_select(0, token[here])
        each = block.split(sizes)
        for i, x_i, both_i in zip(busy, each, both[here].split(sizes), strict=True):
            torch.mm(x_i, enter[i].to(x.dtype).T, out=both_i)
        hidden = rows.gate(both[here], weight[here])
        for i, hidden_i, y_i in zip(busy, hidden.split(sizes), each, strict=True):
            torch.mm(hidden_i, leave[i].to(x.dtype).T, out=y_i)  # the block's x is done with
        rows.add(y, token[here], block)
    return y, both


def backward(
    rows: Rows,
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    token: Tensor,
    counts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    both: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, gate_up and down; arguments as in and from `forward`, grad_y in x's
    dtype."""
    grad_x, grad_weight = torch.zeros_like(x, dtype=weight.dtype), torch.zeros_like(weight)
    grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
    enter, leave = gate_up.unbind(), down.unbind()
    grad_enter, grad_leave = grad_gate_up.unbind(), grad_down.unbind()
    for here, busy, sizes in _blocks(counts):
        block, grad = (v.index_select(0, token[here]) for v in (x, grad_y))
        grads, grad_hidden = grad.split(sizes), grad.new_empty(len(grad), down.shape[2])
        for i, grad_i, out in zip(busy, grads, grad_hidden.split(sizes), strict=True):
            torch.mm(grad_i, leave[i].to(x.dtype), out=out)
        hidden, grad_both, grad_weight[here] = rows.slope(both[here], weight[here], grad_hidden)
        parts = [v.split(sizes) for v in (block, hidden, grad_both)]
        for i, grad_i, x_i, hidden_i, both_i in zip(busy, grads, *parts, strict=True):
            _product(grad_i.T, hidden_i, grad_leave[i])
            _product(both_i.T, x_i, grad_enter[i])
            torch.mm(both_i, enter[i].to(x.dtype), out=x_i)
        rows.add(grad_x, token[here], block)
    for i, count in enumerate(counts.tolist()):
        if not count:
            grad_enter[i].zero_()
            grad_leave[i].zero_()
    return grad_x.to(x.dtype), grad_weight, grad_gate_up, grad_down


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:  # under autocast
        out.copy_(a @ b)


def _results(x: Tensor, weight: Tensor, token: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Room for what `forward` returns."""
    return torch.zeros_like(x, dtype=weight.dtype), x.new_empty(len(token), 2 * down.shape[2])


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


class Sorted(torch.autograd.Function):
    """`forward` with `backward` as its gradient, which has one too: that of the reference."""

    @staticmethod
    def forward(ctx: Any, rows: Rows, x: Tensor, *others: Tensor) -> Tensor:  # pyright: ignore
        y, both = forward(rows, x, *others)  # pyright: ignore
        ctx.save_for_backward(x, *others, both)
        ctx.rows = rows
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:  # pyright: ignore
        if too_narrow(grad_y):
            return None, *gradients(mix_sorted_ref, ctx.saved_tensors[:-1], (grad_y,))
        dx, dw, *others = backward(ctx.rows, grad_y, *ctx.saved_tensors)
        return None, dx, dw, None, None, *others


MIX_SORTED = Engines(
    "mix_sorted",
    reference=mix_sorted_ref,
    torch=mix_sorted,
    native="kizzasi.models.ops.native.experts:mix_sorted",
)


@torch.library.custom_op("kizzasi::mix_swiglu", mutates_args=())
def _node(
    x: Tensor, weight: Tensor, token: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    return forward(TORCH, x, weight, token, counts, gate_up, down)


@torch.library.custom_op("kizzasi::mix_swiglu_backward", mutates_args=())
def _node_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    token: Tensor,
    counts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    both: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backward(TORCH, grad_y, x, weight, token, counts, gate_up, down, both)


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
