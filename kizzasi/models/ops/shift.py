"""Token shift: what the token before had in each channel.

Symbols: b batch, t time, d d_model.

Source: Peng et al. 2023, arXiv:2305.13048, section 3.1.1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_shift(
    x: Tensor, last: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Delay a sequence by one token.

        before[t] = x[t-1],      before[0] = last

    Args:
        x: (b, t, d).
        last: (b, d) the token before x[:, 0], read in x's dtype; zeros if None.
        starts: (b, t) bool, True where the token before belongs to another document: zeros there.

    Returns:
        (b, t, d) before, and (b, d) the last token of x.
    """
    first = torch.zeros_like(x[:, :1]) if last is None else last.to(x.dtype).unsqueeze(1)
    before = torch.cat([first, x[:, :-1]], 1)
    if starts is not None:
        before = before.masked_fill(starts.unsqueeze(-1), 0.0)
    return before, x[:, -1].clone()  # a copy, or the state would keep all of x in memory
