"""Attention of a single token to keys and values in codes, where those of all rows are in order.

    s      slots that are seen: `done` in codes, and then `n_open` as they are
    n      tokens of a group whose keys are coded by channel; 0: token by token, none is open
    g      first slots that are seen as they are kept beside the codes

Source: as in `kv_codes`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.ops.engines import Engines
from kizzasi.models.ops.kv_codes import KVQuant, decode, decode_channels


class Coded(NamedTuple):
    """Keys and values, each of which may have slots to spare at the end.

    k, v              (b, h, slots, bytes) codes.
    k_scale           (b, h, slots, parts) token by token; of groups: (b, h, groups, width), steps.
    k_least           (b, h, groups, width) of groups; else None.
    v_scale           (b, h, slots, parts).
    k_first, v_first  (b, h, g, width).
    k_open, v_open    (b, h, n, width) of groups; else None.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor
    k_least: Tensor | None
    v_scale: Tensor
    k_first: Tensor
    v_first: Tensor
    k_open: Tensor | None
    v_open: Tensor | None


def coded_attention_ref(q: Tensor, coded: Coded, s: int, kind: KVQuant) -> Tensor:
    """Decode all that is seen, and attend to it.

    Args:
        q: (b, h, queries, width), those of all heads that read these keys.
        coded: what is remembered.
        s: slots that are seen.
        kind: of the codes.

    Returns:
        (b, h, queries, width).
    """
    done, g = done_of(coded, s), min(coded.k_first.shape[2], s)
    width, dtype = q.shape[-1], q.dtype
    k = coded.k[:, :, :done]
    if coded.k_least is None:
        k = decode(k, coded.k_scale[:, :, :done], kind, width, dtype)
    else:
        n = _tokens(coded)
        step, least = (x[:, :, : done // n].unsqueeze(3) for x in (coded.k_scale, coded.k_least))
        k = decode_channels(k.unflatten(2, (done // n, n)), step, least, kind, dtype).flatten(2, 3)
    v = decode(coded.v[:, :, :done], coded.v_scale[:, :, :done], kind, width, dtype)
    if coded.k_open is not None and coded.v_open is not None:
        k = torch.cat([k, coded.k_open[:, :, : s - done].to(dtype)], 2)
        v = torch.cat([v, coded.v_open[:, :, : s - done].to(dtype)], 2)
    k = torch.cat([coded.k_first[:, :, :g].to(dtype), k[:, :, g:]], 2)
    v = torch.cat([coded.v_first[:, :, :g].to(dtype), v[:, :, g:]], 2)
    return F.scaled_dot_product_attention(q, k, v)


def coded_attention(q: Tensor, coded: Coded, s: int, kind: KVQuant) -> Tensor:
    """`coded_attention_ref` head by head: what is decoded of one is read before it leaves the cache
    of a core."""
    heads = []
    for i in range(q.shape[1]):
        head = Coded._make(x if x is None else x[:, i : i + 1] for x in coded)
        heads.append(coded_attention_ref(q[:, i : i + 1], head, s, kind))
    return torch.cat(heads, 1)


def done_of(coded: Coded, s: int) -> int:
    """How many of s slots are seen in codes: the group that the last token completed is open."""
    return s if coded.k_open is None else (s - 1) // _tokens(coded) * _tokens(coded)


def _tokens(coded: Coded) -> int:
    """n."""
    return 0 if coded.k_open is None else coded.k_open.shape[2]


NATIVE = "kizzasi.models.ops.native.coded_attention"
CODED_ATTENTION = Engines(
    "coded_attention",
    reference=coded_attention_ref,
    torch=coded_attention,
    native=f"{NATIVE}:coded_attention",
)
