"""Decoding with a state that nobody else holds: caches of attention are written in place.

A state is a value everywhere else. Here one owner steps on and on, so that the slots of a new token
need not be joined to a copy of all slots before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.errors import GenerateError
from kizzasi.models.decoding.reading import as_mask, evaluating, read
from kizzasi.models.kv_cache import AttentionState
from kizzasi.models.state import map_state

if TYPE_CHECKING:
    from kizzasi.models.model import SequenceModel
    from kizzasi.models.state import ModelState

SPARE = 64  # slots at least that a full store grows by


class OwnCache(AttentionState):
    """A cache whose next token is written into a store with room to spare.

    The first `add` makes the store, a private copy; each later one writes into that of its cache.
    Only the newest of such a chain may be added to. What `map_state` makes of it has no store and
    starts a chain of its own.
    """

    store: AttentionState | None = None

    def add(self, k: Tensor, v: Tensor, now: Tensor, window: int | None = None) -> AttentionState:
        slots, store = self.k.shape[2], self.store
        if window is None:
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
            slot = now % window
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


class Decoder:
    """Steps a model with a state of its own, written in place; no gradients, modes stay.

    `generate` does the same by itself. This is for a loop of one's own:

        decoder = Decoder(model)
        logits = decoder.read(prompt)
        while ...:
            logits = decoder.step(choose(logits))

    Args:
        model: a causal model.
        state: what is continued, and left as it is; None starts afresh with the first `read`.
    """

    def __init__(self, model: SequenceModel, state: ModelState | None = None) -> None:
        model.require_causal("a decoder")
        self.model = model
        self._state: ModelState | None = None if state is None else own(state)

    def read(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read many tokens (b, t), or frames (b, t, n_in), at once.

        Args:
            mask: (b, t), False for left padding, also after earlier tokens.

        Returns:
            (b, v) logits after the last one.
        """
        mask = None if mask is None else as_mask(mask, inputs)
        with evaluating(self.model):
            logits, state = read(self.model, inputs, mask, self._state)
            self._state = own(state)
        return logits

    def step(self, inputs: Tensor) -> Tensor:
        """Read one token (b,), or frame (b, n_in), of each row. Returns (b, v) logits after it."""
        with evaluating(self.model):
            state = self._begun(len(inputs))
            logits, self._state, *_ = self.model.step(inputs, state)
        return logits

    def fork(self) -> ModelState:
        """The state as a value: a copy that later steps leave alone, for another decoder, a beam,
        or a file. Raises GenerateError before the first token."""
        if self._state is None:
            raise GenerateError("fork: no token was read yet; call read or step first")
        return disown(self._state)

    def gather(self, rows: Tensor) -> None:
        """Go on with these rows, repeated or reordered at will."""
        if self._state is None:
            raise GenerateError("gather: no token was read yet; call read or step first")
        with torch.no_grad():
            self._state = own(self._state.gather(rows))

    def _begun(self, batch: int) -> ModelState:
        return own(self.model.init_state(batch)) if self._state is None else self._state
