"""What stays in float32 when activations are bfloat16, and in float64 for float64.

Decays, step sizes, norms and routers are *stored* in at least float32 (`KeepFloat32`) and *used* in
at least float32, whatever they are stored in: FSDP2's `MixedPrecisionPolicy` shows a module rounded
copies of its parameters, of which it keeps the float32 originals to itself. With a policy, pass
`cast_forward_inputs=False`, or it rounds the states that a model is given as well; what must not
be rounded even so (`float32_parameters`) can be passed as `fully_shard(..., ignored_params=...)`,
and its gradients averaged by hand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models.ops.norm import RMS_NORM
from kizzasi.models.ops.precision import LOW_PRECISION, full_precision, without_autocast

NormKind = Literal["rms", "rms_plus_one", "layer", "layer_unbiased", "scale"]


_WRAPPED = re.compile(r"\.base_layer(?=\.)|(?:parametrizations\.)(\w+)\.original\d*$")


def original_name(name: str) -> str:
    """The name that a parameter had before an adapter or a parametrisation wrapped it."""
    return _WRAPPED.sub(r"\1", name)


class KeepFloat32(nn.Module):
    """A module whose parameters and buffers named in `float32_parameters` are never stored below
    float32.

    Names may be dotted, such as "dt_proj.bias". Adapters (PEFT) that wrap a layer change nothing,
    and of a parametrised weight (weight_norm) the originals are kept. `.to(torch.bfloat16)`,
    `.half()`, `.to_empty()` and `load_state_dict(..., assign=True)` move them between devices and
    change float32 to float64 or back, but never round them below float32.
    """

    float32_parameters: ClassVar[tuple[str, ...]] = ()

    def _kept(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if original_name(name) in self.float32_parameters:
                yield name, tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepFloat32:
        guarded = {id(t) for _, p in self._kept() for t in (p, p.grad) if t is not None}

        def keep(t: Tensor) -> Tensor:
            moved = fn(t)
            if id(t) not in guarded or moved.dtype not in LOW_PRECISION:
                return moved
            return moved.float() if t.dtype in LOW_PRECISION else t.to(moved.device)

        return super()._apply(keep, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **more: Any) -> None:
        for name, _ in self._kept():  # those of child modules too, which are loaded after this one
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor):
                state_dict[prefix + name] = full_precision(given)
        super()._load_from_state_dict(state_dict, prefix, *args, **more)


def float32_parameters(module: nn.Module) -> set[nn.Parameter]:
    """All parameters below a module that are never stored below float32."""
    kept = (m._kept() for m in module.modules() if isinstance(m, KeepFloat32))
    return {p for named in kept for _, p in named if isinstance(p, nn.Parameter)}


class WideLinear(KeepFloat32, nn.Linear):
    """y = W x + b in at least float32: step sizes, decays and gates that choose.

    Neither the dtype of x, nor autocast, nor weights that were rounded for it lower the precision
    of the sum. The result is in at least float32.
    """

    float32_parameters = ("weight", "bias")

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else full_precision(self.bias)
        with without_autocast(input):
            return F.linear(full_precision(input), full_precision(self.weight), bias)


class Norm(KeepFloat32):
    """RMSNorm or LayerNorm over the last dimension.

        rms            y = w x / sqrt(mean(x^2) + eps)
        rms_plus_one   the same with 1 + w, so that decay pulls the scale to 1 (Gemma; Qwen3-Next's
                       "zero-centered" norm)
        layer          y = w (x - mean) / std + b
        layer_unbiased the same without b (Cohere)
        scale          y = g x / |x| with one number g, sqrt(d) at first (ScaleNorm; Nguyen &
                       Salazar 2019, arXiv:1910.05895)

    Args (forward):
        x: (..., d). The result has x's dtype; statistics are computed in at least float32.
    """

    float32_parameters = ("weight", "bias")
    engine: str = "auto"

    def __init__(self, kind: NormKind, d: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.kind, self.d, self.eps = kind, d, eps
        # A CPU scalar of no dimension: operations take it with any dtype, as they take a number.
        self._eps = torch.tensor(eps, dtype=torch.float64, device="cpu")
        self.weight = nn.Parameter(torch.empty(1 if kind == "scale" else d))
        self.bias = nn.Parameter(torch.empty(d)) if kind == "layer" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        start = {"rms_plus_one": 0.0, "scale": math.sqrt(self.d)}
        nn.init.constant_(self.weight, start.get(self.kind, 1.0))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        wide, weight = full_precision(x), full_precision(self.weight)
        if self.kind in ("layer", "layer_unbiased"):
            bias = None if self.bias is None else full_precision(self.bias)
            return F.layer_norm(wide, (self.d,), weight, bias, self.eps).to(x.dtype)
        if self.kind == "rms_plus_one":
            weight = 1 + weight
        elif self.kind == "scale":
            weight = (weight / math.sqrt(self.d)).expand(self.d)
        run = RMS_NORM.pick(self.engine, x.device)
        return run(wide, weight.to(wide.dtype), self.eps, self._eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.d}, eps={self.eps}"


class HeadNorm(KeepFloat32):
    """GroupNorm with one group per head, over (..., h, n), in at least float32.

    Args:
        d: h n, the channels of all heads.
        eps: every RWKV, whatever its n, divides by 8 and then takes 1e-5: 64e-5 undivided.
        bias: False leaves the bias out.
    """

    float32_parameters = ("weight", "bias")

    def __init__(self, d: int, eps: float = 64e-5, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d)) if bias else None

    def reset_parameters(self, scale: float = 1.0) -> None:
        nn.init.constant_(self.weight, scale)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[-2:]
        x = F.layer_norm(full_precision(x), shape[-1:], eps=self.eps)
        weight = full_precision(self.weight).view(shape)
        if self.bias is None:
            return x * weight
        return torch.addcmul(full_precision(self.bias).view(shape), x, weight)


class GatedNorm(KeepFloat32):
    """RMSNorm per group with a gate: norm(y silu(z)), or norm(y) silu(z) if the norm comes first.

    Args (forward):
        y: (..., d) in at least float32.
        z: (..., d) the gate. The result has z's dtype.
    """

    float32_parameters = ("weight",)

    def __init__(self, d: int, n_groups: int, eps: float, norm_before_gate: bool) -> None:
        super().__init__()
        self.n_groups, self.eps, self.norm_before_gate = n_groups, eps, norm_before_gate
        self.weight = nn.Parameter(torch.empty(d))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        gate = F.silu(full_precision(z))
        y = y if self.norm_before_gate else y * gate
        y = y.unflatten(-1, (self.n_groups, -1))
        y = F.rms_norm(y, y.shape[-1:], eps=self.eps).flatten(-2) * self.weight
        y = y * gate if self.norm_before_gate else y
        return y.to(z.dtype)

    def extra_repr(self) -> str:
        order = "norm before gate" if self.norm_before_gate else "gate before norm"
        return f"{len(self.weight)}, n_groups={self.n_groups}, eps={self.eps}, {order}"
