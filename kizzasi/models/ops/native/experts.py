"""`mix_sorted` in C, on a CPU: all but the products. experts.c says how."""

from __future__ import annotations

from torch import Tensor

from kizzasi.models.ops.native import library
from kizzasi.models.ops.sorted_experts import TORCH, Rows, Sorted


def mix_sorted(
    x: Tensor, weight: Tensor, token: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """`mix_sorted_ref`. Other dtypes and further derivatives are those of the torch form."""
    rows = NATIVE if x.dtype == weight.dtype and x.dtype in library.REALS else TORCH
    weight, token = weight.contiguous(), token.contiguous()
    return Sorted.apply(rows, x, weight, token, counts, gate_up, down)  # pyright: ignore


def _gate(both: Tensor, weight: Tensor, hidden: Tensor) -> None:
    _call("gate", hidden, both, weight, hidden)


def _slope(both: Tensor, weight: Tensor, grad: Tensor, *made: Tensor) -> None:
    _call("slope", grad, both, weight, grad, *made)


def _add(y: Tensor, token: Tensor, rows: Tensor) -> None:
    sizes = *rows.shape, len(y), library.threads(rows.numel())
    library.call("experts_add", y.dtype, [y, token, rows], *sizes)


def _call(name: str, hidden: Tensor, *tensors: Tensor) -> None:
    sizes = *hidden.shape, library.threads(4 * hidden.numel())
    library.call(f"experts_{name}", hidden.dtype, tensors, *sizes)


NATIVE = Rows(_gate, _slope, _add)
