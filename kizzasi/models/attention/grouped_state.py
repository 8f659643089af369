"""What attention keeps that codes its keys by channel; see `grouped`."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.attention.cache import AttentionState, pack
from kizzasi.models.state import loadable


class GroupedState(NamedTuple):
    """An `AttentionState` in codes, keys by channel.

    k, v               (b, n_kv_heads, s, bytes) uint8; what k holds of the open group is not read.
    v_scale            (b, n_kv_heads, s, parts of a head).
    k_step, k_least    (b, n_kv_heads, groups, width), group i of a document in i % groups.
    k_open, v_open     (b, n_kv_heads, n, width) the open group as it is, position p in p % n.
    k_first, v_first   (b, n_kv_heads, n_global, width) the first positions as they are.
    position           as there.
    """

    k: Tensor
    v: Tensor
    v_scale: Tensor
    k_step: Tensor
    k_least: Tensor
    k_open: Tensor
    v_open: Tensor
    k_first: Tensor
    v_first: Tensor
    position: Tensor

    in_order = AttentionState.in_order
    alive = AttentionState.alive
    positions = AttentionState.positions
    places = AttentionState.places
    next_position = AttentionState.next_position
    n_alive = AttentionState.n_alive

    def packed(self, slots: int) -> GroupedState:
        """As of `AttentionState`."""
        leaves, position = pack(self[:3], self.positions(), slots)
        groups = (of_groups(x, slots // self.k_open.shape[2]) for x in self[3:5])
        return GroupedState._make((*leaves, *groups, *self[5:9], position))


class Fresh(NamedTuple):
    """The T tokens of the open group and of a call, in their order, and what is coded of them.

    document, position  (b or 1, T); of what the open group lacks yet, document -1.
    k, v                (b, n_kv_heads, T, width).
    codes, coded        (b, n_kv_heads, T, ...) codes, and as they are read; zero without a code.
    step, least         (b, n_kv_heads, N, width) of groups that are complete now,
    group, of           (b or 1, N), which they are, and their documents; -2: none.
    """

    document: Tensor
    position: Tensor
    k: Tensor
    v: Tensor
    codes: Tensor
    coded: Tensor
    step: Tensor
    least: Tensor
    group: Tensor
    of: Tensor


class New(NamedTuple):
    """The t tokens of a call.

    k, v    (b, n_kv_heads, t, width) as they came, v turned.
    leaves  k, v and v_scale of all slots and tokens.
    """

    k: Tensor
    v: Tensor
    leaves: tuple[Tensor, ...]
    fresh: Fresh | None


def take(x: Tensor, index: Tensor) -> Tensor:
    """Of (b, heads, s, width) what (b or 1, n) names."""
    return x.gather(2, index[:, None, :, None].expand(x.shape[0], x.shape[1], -1, x.shape[3]))


def put(x: Tensor, index: Tensor, new: Tensor) -> Tensor:
    """(b, heads, s, width) with new (b, heads, n, width) where (b or 1, n) names."""
    index = index[:, None, :, None].expand(new.shape)
    return x.scatter(2, index, new.to(x.dtype))


def of_groups(x: Tensor, n: int) -> Tensor:
    """(b, heads, groups, width) with so many groups, the later ones of zeros."""
    return F.pad(x, (0, 0, 0, n - x.shape[2]))


loadable(globals())
