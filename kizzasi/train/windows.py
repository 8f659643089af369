"""Windows of one long sequence: random ones to train on, consecutive ones to score."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kizzasi.errors import DataError
from kizzasi.train.task import IGNORE, spread


def starts(n: int, seed: int, step: int, batch_size: int) -> np.ndarray:
    """(batch_size,) int64 places in range(n) that depend on (seed, step) alone."""
    # The block counter's upper half is the step, so steps never share random numbers.
    random = np.random.Philox(key=seed, counter=step << 128).random_raw(batch_size)
    return (random % np.uint64(n)).astype(np.int64)


def batches(
    tokens: Tensor, seq_len: int, batch_size: int, seed: int, start_step: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw random windows for ever; the batch of a step depends on (seed, step) alone.

        start[step, row] = Philox(key=seed, counter=step)[row] mod (n - seq_len)
        inputs = tokens[start : start + seq_len],   targets = the same, one byte later

    A training resumed at step k with `start_step=k` sees the batches of the uninterrupted one.

    Args:
        tokens: (n,) uint8, on any device.
        seed: 0 <= seed < 2**128.

    Yields:
        inputs and targets, (b, t) long, on the device of tokens.

    Raises:
        DataError: fewer than seq_len + 1 bytes.
    """
    require_enough(tokens, seq_len, seq_len + 1)

    def draw() -> Iterator[tuple[Tensor, Tensor]]:
        offsets = torch.arange(seq_len, device=tokens.device)
        step = start_step
        while True:
            first = torch.from_numpy(starts(len(tokens) - seq_len, seed, step, batch_size))
            index = first.to(tokens.device)[:, None] + offsets
            yield tokens[index].long(), tokens[index + 1].long()
            step += 1

    return draw()


def held_out_windows(
    tokens: Tensor, seq_len: int, n_windows: int | None = None, *, short: bool = False
) -> tuple[Tensor, Tensor]:
    """Cut the held-out bytes into consecutive windows in which each byte is a target exactly once.

    The input of a target is the byte before it; before the very first stands byte 0. The last
    window is filled up with input 0 and target IGNORE, which `cross_entropy` skips.

    Args:
        tokens: (n,) uint8, at least 1.
        n_windows: as many of them, evenly spread; None means all.
        short: take also what does not fill a single window.

    Returns:
        inputs and targets, (ceil(n / seq_len), seq_len) long.

    Raises:
        DataError: fewer than seq_len bytes.
    """
    require_enough(tokens, seq_len, 1 if short else seq_len)
    n = len(tokens)
    chosen = spread(math.ceil(n / seq_len), n_windows).to(tokens.device)
    places = chosen[:, None] * seq_len + torch.arange(seq_len, device=tokens.device)
    there = places < n
    targets = torch.where(there, tokens[places.clamp(max=n - 1)].long(), IGNORE)
    before = tokens[(places - 1).clamp(min=0, max=n - 1)].long()
    return torch.where(there & (places > 0), before, 0), targets


def require_enough(tokens: Tensor, seq_len: int, needed: int) -> None:
    """Raise DataError unless there are `needed` of them."""
    if seq_len < 1:
        raise DataError(f"seq_len={seq_len}: must be at least 1")
    if len(tokens) < needed:
        raise DataError(
            f"this split of the data has {len(tokens)} bytes, and seq_len={seq_len} needs at "
            f"least {needed}; give more data or a shorter seq_len (a tenth is held out by default)"
        )
