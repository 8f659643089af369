"""Steps, decays and angles of Mamba-3, whose memory is `trapezoid` of ssd.py.

b batch · t time · h heads · s pairs of states that turn

Source: arXiv:2603.15569, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.ops.documents import isolated
from kizzasi.models.ops.precision import in_full_precision

TURN = 2 * math.pi
Activation = Literal["softplus", "heavy_tail"]


class Steps(NamedTuple):
    """dt, log_decay, share (..., h): length of a step, log of what is kept, weight of its right
    end; speed (..., h, s): the turn of each pair."""

    dt: Tensor
    log_decay: Tensor
    share: Tensor
    speed: Tensor


@in_full_precision
def mamba3_steps(
    dt: Tensor,
    A: Tensor,
    share: Tensor,
    turn: Tensor,
    dt_bias: Tensor,
    activation: Activation,
    A_floor: float,
) -> Steps:
    """What a layer's projections say of a token's step, in at least float32.

        dt = softplus(dt + dt_bias);    log_decay = -max(activation(A), A_floor) dt
        speed = pi tanh(turn) dt

    Args:
        dt, A, share: (..., h) projections.
        turn: (..., s) projections, which all heads share.
        dt_bias: (h,).
    """
    dt = F.softplus(dt + dt_bias)
    log_decay = -ACTIVATIONS[activation](A).clamp(min=A_floor) * dt
    speed = math.pi * turn.tanh().unsqueeze(-2) * dt.unsqueeze(-1)
    return Steps(dt, log_decay, share.sigmoid(), speed)


def heavy_tail(x: Tensor) -> Tensor:
    """1 + x for x >= 0, 1 / (1 - x) below: positive and smooth, with slower tails than softplus."""
    return torch.where(x >= 0, 1.0 + x, 1.0 / (1.0 - x.clamp(max=0.0)))


def summed_angles(speed: Tensor, angle: Tensor, starts: Tensor | None) -> Tensor:
    """Angles after each token: the sum of speeds since the document's start, modulo 2 pi.

    Summed in float64: a long input's angle is large, and only its remainder counts.

    Args:
        speed: (b, t, h, s).
        angle: (b, h, s) reached before the first token.
        starts: (b, t) bool, True where a document starts from angle zero.

    Returns:
        (b, t, h, s) in [0, 2 pi), in speed's dtype.
    """

    def run(speed: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
        angles = _summed(speed, angle, starts)
        return angles, angles[:, -1]

    return isolated(run, starts, (speed,), (), (angle,))[0]


def _summed(speed: Tensor, angle: Tensor, starts: Tensor | None) -> Tensor:
    carried = angle.double().unsqueeze(1)
    total = carried + speed.double().cumsum(1)
    if starts is not None:
        first = torch.arange(1, starts.shape[1] + 1, device=starts.device)
        first = torch.where(starts, first, 0).cummax(1).values  # 0: the carried document
        before = torch.cat([torch.zeros_like(carried), carried, total[:, :-1]], 1)
        total = total - before.gather(1, first[..., None, None].expand_as(total))
    return total.remainder(TURN).to(speed.dtype)


def turns(angle: Tensor) -> Tensor:
    """cos + i sin of angles, what the rotations below multiply with; complex."""
    return torch.complex(angle.cos(), angle.sin())


def rotate_pairs(v: Tensor, turn: Tensor) -> Tensor:
    """Turn the pairs (0, 1), (2, 3), ... of v (..., n) by `turns` (..., s); the rest passes.

    A pair is a complex number: its two parts lie side by side, and one product reads them in order.
    """
    pairs, rest = v.tensor_split([2 * turn.shape[-1]], -1)
    pairs = torch.view_as_complex(pairs.unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * turn).flatten(-2)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def rotate_halves(v: Tensor, turn: Tensor) -> Tensor:
    """Turn the pairs (i, i + n / 2) of v (..., n) by `turns` (..., s); the other pairs pass."""
    s = turn.shape[-1]
    x, y = v.chunk(2, -1)
    (x, left), (y, right) = x.tensor_split([s], -1), y.tensor_split([s], -1)
    cos, sin = turn.real, turn.imag
    return torch.cat([x * cos - y * sin, left, x * sin + y * cos, right], -1)


ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "softplus": F.softplus,
    "heavy_tail": heavy_tail,
}
