"""The short convolution of a layer: one module that owns its filters and runs both forms.

b batch · t time · c channels · k filter length (d_conv)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models.call import Call
from kizzasi.models.ops.conv import CAUSAL_CONV1D, causal_conv1d_step, last_inputs


class CausalConv(nn.Conv1d):
    """`causal_conv1d` with the parameters of an `nn.Conv1d` with one filter per channel.

    With a call: x (b, t, c) and the state (b, c, k - 1) before it, None for zeros, to y (b, t, c)
    and the state after; in a step x and y are (b, c). Without a call it is the `nn.Conv1d` that
    adapters know, and make more of: (b, c, s) to (b, c, s - k + 1).
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        state: Tensor | None = None,
        call: Call | None = None,
        *,
        silu: bool = False,
        engine: str = "auto",
    ) -> Tensor | tuple[Tensor, Tensor]:
        if call is None:
            return super().forward(x)
        weight = self.weight.squeeze(1)
        if call.step:
            assert state is not None, "a step continues a state"
            return causal_conv1d_step(x, weight, self.bias, state, silu=silu)
        run = CAUSAL_CONV1D.pick(engine, x.device)
        return run(x, weight, self.bias, state, call.starts, silu=silu)


def convolve(
    conv: nn.Module,
    k: int,
    x: Tensor,
    state: Tensor | None,
    call: Call,
    *,
    silu: bool = False,
    engine: str = "auto",
) -> tuple[Tensor, Tensor]:
    """What `conv`, a `CausalConv` of length k or an adapter in its place, makes of x and the state.

    An adapter takes no state and knows no documents, and may mix channels: it is given them as one
    sequence, in which k - 1 zeros come before every document.
    """
    if isinstance(conv, CausalConv):
        return conv(x, state, call, silu=silu, engine=engine)
    z = x.unsqueeze(1) if call.step else x
    (b, t, c), starts = z.shape, call.starts
    before = z.new_zeros(b, c, k - 1) if state is None else state.to(z.dtype)
    if starts is None:
        y = conv(torch.cat([before, z.mT], 2))
    else:
        place = torch.arange(t, device=z.device) + starts.cumsum(1) * (k - 1)
        place = place.unsqueeze(1).expand(b, c, t)
        spread = z.new_zeros(b, c, int(place.max()) + 1).scatter(2, place, z.mT)
        y = conv(torch.cat([before, spread], 2)).gather(2, place)
    y = F.silu(y.mT) if silu else y.mT
    return y.squeeze(1) if call.step else y, last_inputs(z, before.mT, starts)
