"""The one operator that EML attention is made of, and its guarded forms.

Glossary (Odrzywolek 2026, arXiv:2603.21852):
    eml(x, y)      exp(x) - ln(y); with the constant 1 it generates every elementary function
    EXP_LIMIT      the clamp on the exponent in `eml_safe`; exp(20) = 4.85e8
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

EXP_LIMIT = 20.0


def eml(x: Tensor, y: Tensor) -> Tensor:
    """Compute exp(x) - ln(y), unguarded.

    Real y <= 0 gives inf or nan, as `torch.log` does; complex tensors take the principal logarithm.

    Args:
        x: any shape, real or complex.
        y: broadcastable with x.

    Returns:
        the broadcast shape, in the promoted dtype.

    Source: arXiv:2603.21852, equation 1.
    """
    return torch.exp(x) - torch.log(y)


def eml_safe(x: Tensor, y: Tensor) -> Tensor:
    """Compute exp(clamp(x, -20, 20)) - ln(y), with a floor under y.

    For y <= 0 the logarithm is that of the dtype's smallest normal number (-708.396 in float64),
    with gradient zero. nan in x passes through; nan in y counts as y <= 0.

    Args:
        x: any shape, float32 or float64.
        y: broadcastable with x.

    Returns:
        the broadcast shape, always finite for finite x.

    Source: eml-core's operator, to the digit in float64.
    """
    floor = torch.finfo(y.dtype).tiny
    y = torch.where(y > 0, y, torch.full_like(y, floor))
    return torch.exp(x.clamp(-EXP_LIMIT, EXP_LIMIT)) - torch.log(y)


def eml_soft(x: Tensor, y: Tensor, limit: float = 3.0) -> Tensor:
    """Compute exp(limit * tanh(x / limit)) - ln(1 + softplus(y)): no kink, no dead gradient.

    The soft clamp bounds the exponential, so that one outlier cannot reach 1e8 as it can in
    `eml_safe`; the softplus guard keeps the logarithm's argument above 1.

    Args:
        x: any shape, float32 or float64.
        y: broadcastable with x.
        limit: bound on the exponent; the output stays within exp(limit) + ln(1 + softplus(y)).

    Returns:
        the broadcast shape.
    """
    return torch.exp(limit * torch.tanh(x / limit)) - torch.log1p(F.softplus(y))


def softmax3(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the softmax of three tensors, elementwise: three weights that sum to 1."""
    alpha, beta, gamma = torch.softmax(torch.stack((a, b, c)), dim=0)
    return alpha, beta, gamma


def safe_node(x: Tensor, v: Tensor, c2: Tensor) -> Tensor:
    """One level of eml-core's chain: eml_safe(x, |v| + c2 + 1)."""
    return eml_safe(x, v.abs() + c2 + 1.0)


def soft_node(x: Tensor, v: Tensor, c2: Tensor) -> Tensor:
    """One level of EML attention's chain: eml_soft(x, v + c2)."""
    return eml_soft(x, v + c2)


def eml_chain(
    v: Tensor, coefficients: Tensor, node: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Run v through `depth` EML operators.

        v <- node(v c0 + c1, v, c2),      once per level

    Args:
        v: (..., i).
        coefficients: (..., i, depth, 3), broadcastable; c0, c1, c2 last.
        node: `safe_node` or `soft_node`.

    Returns:
        (..., i); with `soft_node` bounded for any v.
    """
    for level in range(coefficients.shape[-2]):
        c0, c1, c2 = coefficients[..., level, :].unbind(-1)
        v = node(v * c0 + c1, v, c2)
    return v
