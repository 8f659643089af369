"""Normalisation that stays in float32 when activations are bfloat16, and in float64 for float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models.ops.precision import LOW_PRECISION, full_precision

NormKind = Literal["rms", "rms_plus_one", "layer"]


class KeepFloat32(nn.Module):
    """A module whose parameters named in `float32_parameters` are never stored below float32.

    Names may be dotted, such as "dt_proj.bias". Adapters (PEFT) that wrap a layer change nothing.
    `.to(torch.bfloat16)`, `.half()` and friends move them between devices and change float32 to
    float64 or back, but leave their precision alone where it would fall under float32.
    """

    float32_parameters: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepFloat32:
        kept = [
            p
            for name, p in self.named_parameters()
            if name.replace(".base_layer.", ".") in self.float32_parameters
        ]
        guarded = {id(t) for p in kept for t in (p, p.grad) if t is not None}

        def keep(t: Tensor) -> Tensor:
            moved = fn(t)
            low = id(t) in guarded and moved.dtype in LOW_PRECISION
            return t.to(moved.device) if low else moved

        return super()._apply(keep, recurse)


class Norm(KeepFloat32):
    """RMSNorm or LayerNorm over the last dimension.

        rms            y = w x / sqrt(mean(x^2) + eps)
        rms_plus_one   the same with 1 + w, so that decay pulls the scale to 1 (Gemma; Qwen3-Next's
                       "zero-centered" norm)
        layer          y = w (x - mean) / std + b

    Args (forward):
        x: (..., d). The result has x's dtype; statistics are computed in at least float32.
    """

    float32_parameters = ("weight", "bias")

    def __init__(self, kind: NormKind, d: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.kind, self.d, self.eps = kind, d, eps
        # A CPU scalar of no dimension: operations take it with any dtype, as they take a number.
        self._eps = torch.tensor(eps, dtype=torch.float64, device="cpu")
        self.weight = nn.Parameter(torch.empty(d))
        self.bias = nn.Parameter(torch.empty(d)) if kind == "layer" else None

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.kind == "rms_plus_one" else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        wide = full_precision(x)
        if self.bias is not None:
            return F.layer_norm(wide, (self.d,), self.weight, self.bias, self.eps).to(x.dtype)
        weight = 1 + self.weight if self.kind == "rms_plus_one" else self.weight
        if not x.is_cpu:
            return F.rms_norm(wide, (self.d,), weight, self.eps).to(x.dtype)
        # The CPU has no fused kernel: torch runs eight small ones, and decoding waits for each.
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps, size, size, value=1 / self.d).rsqrt()
        return (wide * weight * scale).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.d}, eps={self.eps}"


class HeadNorm(KeepFloat32):
    """GroupNorm with one group per head, over (..., h, n), in at least float32.

    Args:
        d: h n, the channels of all heads.
        eps: every RWKV, whatever its n, divides by 8 and then takes 1e-5: 64e-5 undivided.
    """

    float32_parameters = ("weight", "bias")

    def __init__(self, d: int, eps: float = 64e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(d))
        self.bias = nn.Parameter(torch.empty(d))

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[-2:]
        x = F.layer_norm(full_precision(x), shape[-1:], eps=self.eps)
        return torch.addcmul(self.bias.view(shape), x, self.weight.view(shape))
