"""States that one owner steps on along one line: caches of attention are written in place.

A state is a value everywhere else. Here the slots of a new token need not be joined to a copy of
all slots before it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.attention.cache import ALL, AttentionState
from kizzasi.models.ops.stencil import Stencil
from kizzasi.models.state import map_state

SPARE = 64  # slots at least that a full store grows by


class OwnCache(AttentionState):
    """A cache whose next token is written into a store with room to spare.

    The first `add` makes the store, a private copy; each later one writes into that of its cache.
    Only the newest of such a chain may be added to. What `map_state` makes of it has no store and
    starts a chain of its own.
    """

    store: AttentionState | None = None

    def add(self, k: Tensor, v: Tensor, now: Tensor, stencil: Stencil = ALL) -> AttentionState:
        slots, store = self.k.shape[2], self.store
        if stencil.slots is None:
            if store is None or store.k.shape[2] == slots or store.k.dtype != k.dtype:
                store = self._grown(k.dtype)
            store.k[:, :, slots] = k[:, :, 0]
            store.v[:, :, slots] = v[:, :, 0]
            position = store.position
            if not self.in_order:
                position[:, slots] = now[:, 0]
                position = position[:, : slots + 1]
            after = OwnCache(store.k[:, :, : slots + 1], store.v[:, :, : slots + 1], position)
        else:
            if store is None or store.k.dtype != k.dtype:
                own_k, own_v = (part.to(k.dtype, copy=True) for part in (self.k, self.v))
                store = AttentionState(own_k, own_v, self.position.clone())
            slot = stencil.slot(now)
            index = slot[:, None, :, None]
            store.position.scatter_(1, slot, now)
            store.k.scatter_(2, index.expand_as(k), k)
            store.v.scatter_(2, index.expand_as(v), v)
            after = OwnCache(*store)
        after.store = store
        return after

    def _grown(self, dtype: torch.dtype) -> AttentionState:
        """A copy with twice the room."""
        spare = max(SPARE, self.k.shape[2])
        k, v = (F.pad(part.to(dtype), (0, 0, 0, spare)) for part in (self.k, self.v))
        position = self.position if self.in_order else F.pad(self.position, (0, spare), value=-1)
        return AttentionState(k, v, position)


def own(state: Any) -> Any:
    """The same state, whose caches will be written in place; for one owner, who steps along one
    line. The given state is left as it is."""
    return _recast(state, OwnCache)


def disown(state: Any) -> Any:
    """A copy of an owned state that is a value again."""
    return _recast(map_state(Tensor.clone, state), AttentionState)


def _recast(tree: Any, kind: type[AttentionState]) -> Any:
    if isinstance(tree, AttentionState):
        return kind(*tree)
    if isinstance(tree, (Tensor, str)):
        return tree
    parts = [_recast(branch, kind) for branch in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
