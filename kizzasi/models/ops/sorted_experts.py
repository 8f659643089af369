"""Packed SwiGLU experts, each on its own rows: one dense product per group of jobs.

    y[t] = sum over jobs j with token[j] = t of weight[j] W_down[i] (silu(gate) * up),
    [gate; up] = W_gate_up[i] x[t],   with i the expert of j; jobs are sorted by expert

torch   blocks of a few experts, on rows that stay in the cache; plain autograd writes every
        gathered row, result and gradient to memory once more.
native  the same products; what stands between them, in C.

In a graph it is one node, `mix_sorted_node`, which runs the torch form.

Symbols: n tokens, m jobs, e experts, d width, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.ops.autodiff import gradients, too_narrow, transformed
from kizzasi.models.ops.engines import Engines

BLOCK = 2**18  # gates and ups that are made at once, by whole experts: a megabyte in the cache


def mix_sorted_ref(
    x: Tensor, weight: Tensor, token: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """One expert after the other.

    Args:
        x: (n, d).
        weight, token: (m,), sorted by expert; those behind counts.sum() are of nobody. The weights
            are of x's dtype, and at least float32.
        counts: (e,) int64, how many jobs each expert has.
        gate_up: (e, 2h, d), gates first.
        down: (e, d, h).

    Returns:
        (n, d), in x's dtype; sums are taken in that of the weights.
    """
    y = x.new_zeros(x.shape, dtype=weight.dtype)
    groups = (v[: int(counts.sum())].split(counts.tolist()) for v in (token, weight))
    for enter, leave, here, w in zip(gate_up.unbind(), down.unbind(), *groups, strict=True):
        gate, up = F.linear(x[here], enter.to(x.dtype)).chunk(2, dim=-1)
        y = y.index_add(0, here, F.linear(F.silu(gate) * up, leave.to(x.dtype)) * w[:, None])
    return y.to(x.dtype)


def mix_sorted(
    x: Tensor, weight: Tensor, token: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """`mix_sorted_ref`, as torch does it; inside torch.func it is that."""
    run = mix_sorted_ref if transformed() else _torch
    return run(x, weight, token, counts, gate_up, down)


def _torch(*given: Tensor) -> Tensor:
    return Sorted.apply(TORCH, *given)  # pyright: ignore


class Rows(NamedTuple):
    """The work on rows of jobs between the products.

    gate   (m, 2h) gates and ups, (m,) weights; makes (m, h) weight silu(gate) up
    slope  the same two, and (m, h) the gradient of that product without its weight; makes the
           product, and the gradients of both arguments
    add    y (n, d), (m,) tokens, (m, d) rows; adds the rows to y

    What is made goes to the last arguments.
    """

    gate: Callable[[Tensor, Tensor, Tensor], object]
    slope: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], object]
    add: Callable[[Tensor, Tensor, Tensor], object]


def _gate(both: Tensor, weight: Tensor, hidden: Tensor) -> None:
    gate, up = both.chunk(2, dim=1)
    torch.mul(F.silu(gate), up, out=hidden).mul_(weight[:, None])


def _slope(
    both: Tensor,
    weight: Tensor,
    grad: Tensor,
    hidden: Tensor,
    grad_both: Tensor,
    grad_weight: Tensor,
) -> None:
    (gate, up), (grad_gate, grad_up) = (v.chunk(2, dim=1) for v in (both, grad_both))
    silu = F.silu(gate)
    torch.mul(silu, up, out=hidden)
    torch.sum(grad * hidden, -1, dtype=weight.dtype, out=grad_weight)
    hidden.mul_(weight[:, None])
    grad = grad * weight[:, None]
    torch.mul(silu, grad, out=grad_up)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad.mul_(up), gate))


TORCH = Rows(_gate, _slope, lambda y, token, rows: y.index_add_(0, token, rows.to(y.dtype)))


def run_forward(
    rows: Rows,
    x: Tensor,
    weight: Tensor,
    token: Tensor,
    counts: Tensor,
    gate_up: Tensor,
    down: Tensor,
) -> tuple[Tensor, Tensor]:
    """Block by block.

    Args:
        rows: see there.
        x, weight, token, counts, gate_up, down: as in `mix_sorted_ref`; x's dtype may be another
            than that of the matrices, which are then cast.

    Returns:
        (n, d) in weight's dtype, and (m, 2h) what the gates and the ups gave.
    """
    y, both = _results(x, weight, token, down)
    enter, leave = gate_up.mT.unbind(), down.mT.unbind()
    for here, busy, sizes, (block, hidden) in _blocks(counts, both, *down.shape[1:]):
        torch.index_select(x, 0, token[here], out=block)
        each = block.split(sizes)
        for i, x_i, both_i in zip(busy, each, both[here].split(sizes), strict=True):
            torch.mm(x_i, enter[i].to(x.dtype), out=both_i)
        rows.gate(both[here], weight[here], hidden)
        for i, hidden_i, y_i in zip(busy, hidden.split(sizes), each, strict=True):
            torch.mm(hidden_i, leave[i].to(x.dtype), out=y_i)  # the block's x is done with
        rows.add(y, token[here], block)
    return y, both


def run_backward(
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
    """Gradients of x, weight, gate_up and down; arguments as in and from `run_forward`, grad_y in
    x's dtype."""
    grad_x, grad_weight = x.new_zeros(x.shape, dtype=weight.dtype), torch.zeros_like(weight)
    grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
    enter, leave = gate_up.unbind(), down.unbind()
    grad_enter, grad_leave = grad_gate_up.unbind(), grad_down.unbind()
    d, h = down.shape[1:]
    for here, busy, sizes, room in _blocks(counts, both, d, d, h, h, 2 * h):
        block, grad, grad_hidden, hidden, grad_both = room
        torch.index_select(x, 0, token[here], out=block)
        torch.index_select(grad_y, 0, token[here], out=grad)
        grads = grad.split(sizes)
        for i, grad_i, out in zip(busy, grads, grad_hidden.split(sizes), strict=True):
            torch.mm(grad_i, leave[i].to(x.dtype), out=out)
        w, grad_w = weight[here], grad_weight[here]
        rows.slope(both[here], w, grad_hidden, hidden, grad_both, grad_w)
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
    """Room for what `run_forward` returns."""
    y = x.new_zeros(x.shape, dtype=weight.dtype)
    return y, x.new_empty(len(token), 2 * down.shape[2])


def _blocks(
    counts: Tensor, both: Tensor, *widths: int
) -> Iterator[tuple[slice, list[int], list[int], list[Tensor]]]:
    """Runs of experts whose jobs make BLOCK of both, gates and ups, or more, the last run perhaps
    fewer: the rows of all, the indices of those that have jobs, how many each has, and room for
    rows of some widths, in the dtype of both, which is the same memory for all runs."""
    start = end = 0
    busy: list[int] = []
    runs: list[tuple[slice, list[int]]] = []
    each = counts.tolist()
    for i, count in enumerate(each):
        end += count
        if count:
            busy.append(i)
        if busy and ((end - start) * both.shape[1] >= BLOCK or i == len(each) - 1):
            runs.append((slice(start, end), busy))
            start, busy = end, []
    most = max((here.stop - here.start for here, _ in runs), default=0)
    rooms = [both.new_empty(most, width) for width in widths]
    for here, busy in runs:
        room = [rows[: here.stop - here.start] for rows in rooms]
        yield here, busy, [each[i] for i in busy], room


class Sorted(torch.autograd.Function):
    """`run_forward`, with `run_backward` as its gradient, which has one too: the reference's."""

    @staticmethod
    def forward(ctx: Any, rows: Rows, x: Tensor, *others: Tensor) -> Tensor:  # pyright: ignore
        y, both = run_forward(rows, x, *others)  # pyright: ignore
        ctx.save_for_backward(x, *others, both)
        ctx.rows = rows
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:  # pyright: ignore
        if too_narrow(grad_y):
            return None, *gradients(mix_sorted_ref, ctx.saved_tensors[:-1], (grad_y,))
        dx, dw, *others = run_backward(ctx.rows, grad_y, *ctx.saved_tensors)
        return None, dx, dw, None, None, *others


@torch.library.custom_op("kizzasi::mix_swiglu", mutates_args=())
def mix_sorted_node(
    x: Tensor, weight: Tensor, token: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    return run_forward(TORCH, x, weight, token, counts, gate_up, down)


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
    return run_backward(TORCH, grad_y, x, weight, token, counts, gate_up, down, both)


@mix_sorted_node.register_fake
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


mix_sorted_node.register_autograd(_differentiate, setup_context=_save)


MIX_SORTED = Engines(
    "mix_sorted",
    reference=mix_sorted_ref,
    torch=mix_sorted,
    native="kizzasi.models.ops.native.experts:mix_sorted",
)
