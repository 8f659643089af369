"""Rotary position embeddings: pair i of a head is turned by the angle position * frequency[i].

    frequencies  theta_i, section 3.2.2      theta    the base, 10000 in the paper
    n_rotated    d, how many entries of a head are rotated (all, or the first few)
    position     m, counted from 0 in every document

Pairs are entries (i, i + n_rotated / 2), as Llama stores its weights; the paper pairs (2i, 2i + 1),
and so does DeepSeek: `split_pairs` takes one order to the other.

Source: Su et al. 2021, arXiv:2104.09864. YaRN: Peng et al. 2023, arXiv:2309.00071. xPos: Sun et al.
2022, arXiv:2212.10554.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rope_frequencies(
    n_rotated: int, theta: float, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(n_rotated / 2,) angle per token of every pair: theta ** (-2 i / n_rotated)."""
    last = 2 / n_rotated - 1
    return torch.logspace(0, last, n_rotated // 2, base=theta, device=device, dtype=dtype)


def ntk_theta(theta: float, factor: float, n_rotated: int) -> float:
    """The base that stretches the slowest pair by `factor` and leaves the fastest one alone.

    Source: arXiv:2309.00071, section 3.1 ("NTK-aware" interpolation, static form).
    """
    return theta * factor ** (n_rotated / (n_rotated - 2))


def yarn_frequencies(
    frequencies: Tensor,
    theta: float,
    factor: float,
    original_context: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Tensor:
    """Slow pairs are stretched by `factor`, fast pairs kept, and the ones between are blended.

        f'[i] = f[i] ((1 - r[i]) + r[i] / factor),    r = ramp from 0 to 1

    The ramp begins at the pair that turns beta_fast times within original_context tokens and ends
    at the pair that turns beta_slow times; `truncate` rounds both ends outwards to whole pairs.

    Args:
        frequencies: (n_rotated / 2,) from `rope_frequencies` with the same theta.
        theta: the base of `frequencies`.
        factor: context after extension / original_context.
        original_context: tokens that the model was trained on.

    Returns:
        (n_rotated / 2,) frequencies.

    Source: arXiv:2309.00071, section 3.2. The rounding is that of its published code.
    """
    n_pairs = frequencies.shape[0]

    def pair_turning(times: float) -> float:
        return n_pairs * math.log(original_context / (2 * math.pi * times)) / math.log(theta)

    low, high = pair_turning(beta_fast), pair_turning(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * n_pairs - 1)
    pair = torch.arange(n_pairs, device=frequencies.device, dtype=frequencies.dtype)
    ramp = ((pair - low) / (high - low or 1e-3)).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / factor * ramp


def llama3_frequencies(
    frequencies: Tensor,
    factor: float,
    original_context: int,
    low_freq_factor: float,
    high_freq_factor: float,
) -> Tensor:
    """Like `yarn_frequencies`, but blended by the turns themselves instead of the pair's index.

        f'[i] = f[i] (r[i] + (1 - r[i]) / factor),    r = (turns - low) / (high - low) in [0, 1]

    with turns = f[i] original_context / (2 pi).

    Source: Dubey et al. 2024, arXiv:2407.21783; the formula is that of its published code.
    """
    turns = frequencies * (original_context / (2 * math.pi))
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequencies * kept + frequencies / factor * (1 - kept)


def yarn_attention_factor(factor: float) -> float:
    """Scale of the rotated queries and keys that keeps attention as sharp as before the stretch.

    Source: arXiv:2309.00071, equation 22.
    """
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_tables(position: Tensor, frequencies: Tensor, scale: float = 1.0) -> Tensor:
    """Cosine and sine of every entry, for positions (b, t): the first of a pair turns backwards.

    Returns:
        (2, b, 1, t, n_rotated) in the dtype of the frequencies.
    """
    angle = position[:, None, :, None] * torch.cat([-frequencies, frequencies])
    tables = torch.stack([angle.cos(), angle.sin()])
    return tables if scale == 1.0 else tables * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first n_rotated entries of every head; the rest pass unchanged.

    Args:
        x: (b, h, t, head_dim).
        cos, sin: (b, 1, t, n_rotated), the parts of `rope_tables`.

    Returns:
        (b, h, t, head_dim) in x's dtype; the products are formed in at least the tables' dtype.
    """
    n = cos.shape[-1]
    if n < x.shape[-1]:
        return torch.cat([rotate(x[..., :n], cos, sin), x[..., n:]], dim=-1)
    return torch.addcmul(x * cos, x.roll(n // 2, -1), sin).to(x.dtype)


def xpos_scales(position: Tensor, n_rotated: int, base: float, dtype: torch.dtype) -> Tensor:
    """How much a query's entries grow with its position; a key's shrink as much.

        zeta[i] = (2 i / n_rotated + 0.4) / 1.4;    scale[m, i] = zeta[i] ** (m / base)

    A score thus fades with the distance, slow pairs last.

    Args:
        position: (b, t).
        base: positions in which pair i fades by zeta[i].

    Returns:
        (b, 1, t, n_rotated), of the same pairs as `rope_tables`.

    Source: arXiv:2212.10554, section 2.2 and algorithm 1.
    """
    pair = torch.arange(n_rotated // 2, device=position.device, dtype=dtype)
    zeta = (2 * pair / n_rotated + 0.4) / 1.4
    return torch.cat([zeta, zeta]) ** (position[:, None, :, None] / base)


def split_pairs(x: Tensor) -> Tensor:
    """Entries (2i, 2i + 1) of the last dimension to places (i, i + n / 2)."""
    return x.unflatten(-1, (-1, 2)).mT.flatten(-2)
