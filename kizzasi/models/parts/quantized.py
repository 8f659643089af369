"""A linear layer whose weight stays in 4 or 8 bits, for decoding on the CPU: it waits for memory.

    w = scale * level + minimum      level: small integers; a scale and a minimum per 32 inputs

native  levels, scales and minima as they are, products in float32: nothing is rounded. See
        `kizzasi.models.ops.packed`.
torch   where there are no kernels. torch's knows levels of 4 bits and computes (level - 8) * scale
        + zero in float32 from bfloat16 inputs, scales and zeros, to bfloat16 outputs. Wider levels
        are cut in two planes,

            level = 16 high + low,      W x = [W_high, W_low] [x; x],

        which one call sums up. So levels are exact, and what is rounded to bfloat16 (8 bits) are
        the scales once, and inputs and outputs at every call: a layer's result differs by less than
        1% of its size. On SmolLM2-135M (Q4_1) logits, of -33 to 39, differ by 0.08 on average, the
        next token's distribution by 0.0004 to 0.001 nats, and 98 of 100 likeliest tokens are the
        same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kizzasi.errors import CheckpointError
from kizzasi.models.ops.packed import GROUP, PACKED_LINEAR, Packed, pack


class LevelTensor(NamedTuple):
    """A matrix (n, k) in integers.

    level    (n, k / 32, 32) int8.
    scale    (n, k / 32, 1) float32.
    minimum  the same, or None for zero.
    """

    level: Tensor
    scale: Tensor
    minimum: Tensor | None


class QuantizedLinear(nn.Module):
    """y = W x + b with W in integers. Not trainable, and not in any state_dict.

    Args:
        weight: n must be a multiple of 16.
        bias: (n,), kept as it is.
    """

    packed: Tensor
    scales: Tensor
    minima: Tensor

    def __init__(self, weight: LevelTensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.n_out, self.n_in = weight.level.flatten(1).shape
        self.engine = PACKED_LINEAR.resolve("auto", weight.level.device)
        if self.engine == "native":
            self._keep(pack(*weight))
        else:
            self._keep_for_torch(weight)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def _keep(self, weight: Packed) -> None:
        self.bits = 4 if weight.codes.dtype == torch.uint8 else 8
        self.register_buffer("packed", weight.codes, persistent=False)
        # Seen as integers, they stay what they are when the model changes its dtype.
        self.register_buffer("scales", weight.scale.view(torch.int32), persistent=False)
        self.register_buffer("minima", weight.minimum.view(torch.int32), persistent=False)

    def _keep_for_torch(self, weight: LevelTensor) -> None:
        level, scale, zero = _planes(weight)
        self.n_planes = level.shape[1] // weight.level.shape[1]
        self.bits = 4 * self.n_planes
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(level.flatten(1).int(), 1)
        scales = torch.cat([scale, zero], dim=-1).transpose(0, 1).bfloat16().contiguous()
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", scales.view(torch.int16), persistent=False)

    @property
    def levels(self) -> Packed | None:
        """The weight, of the native form."""
        if self.engine != "native":
            return None
        return Packed(self.packed, *(x.view(torch.float32) for x in (self.scales, self.minima)))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., k) to (..., n) in x's dtype."""
        weight = self.levels
        if weight is not None:
            rows = x.reshape(-1, x.shape[-1]).float()
            bias = None if self.bias is None else self.bias.float()
            y = PACKED_LINEAR.pick(self.engine, x.device)(rows, weight, bias)
            return y.to(x.dtype).view(*x.shape[:-1], -1)
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        if self.n_planes == 2:
            rows = torch.cat([rows, rows], dim=1)
        scales = self.scales.view(torch.bfloat16)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, scales)
        y = y.to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in={self.n_in}, out={self.n_out}, bits={self.bits}, engine={self.engine}"

    def _save_to_state_dict(self, destination: object, prefix: str, keep_vars: bool) -> None:
        rule = "quantized weights are not saved; keep the file they came from, or load it in full"
        raise CheckpointError(f"{prefix[:-1]}: {rule}")


def _planes(weight: LevelTensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels of 0 to 15 with scale and zero of (level - 8) * scale + zero, in one plane or two."""
    level, scale, minimum = weight
    minimum = torch.zeros_like(scale) if minimum is None else minimum
    low, high = (int(end) for end in level.aminmax())
    if low >= 0 and high <= 15:
        return level, scale, minimum + 8 * scale
    if low >= -8 and high <= 7:
        return level + 8, scale, minimum
    levels = torch.cat([(level >> 4) + 8, level & 15], dim=1)
    zeros = torch.cat([torch.zeros_like(scale), minimum + 8 * scale], dim=1)
    return levels, torch.cat([16 * scale, scale], dim=1), zeros
