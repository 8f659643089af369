"""Keys and values in codes that are written where they will be read.

room   slots that a store has; those from `n` on are free
place  position of the token, the same in every row
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.attention.grouped import GroupedMemory
from kizzasi.models.attention.grouped_state import GroupedState
from kizzasi.models.attention.memory import CodedState, Remembers
from kizzasi.models.decoding.own_cache import SPARE
from kizzasi.models.ops.coded_attention import CODED_ATTENTION, Coded
from kizzasi.models.ops.kv_codes import KVQuant, encode, encode_channels

CodedCache = CodedState | GroupedState


class CodedStore:
    """A `CodedState` or `GroupedState` of rows that are all at one place, written in place: a token
    is coded once, and its codes are never copied. What is seen is read of them for every token.

    As long as a ring is not full its slots are in order, as without a window.

    Args:
        engine: that attends.
    """

    def __init__(self, state: CodedCache, memory: Remembers, engine: str) -> None:
        self.memory, self.stencil = memory, memory.stencil
        self.n = memory.n if isinstance(memory, GroupedMemory) else 0
        self.place = int(state.next_position()[0])
        self.leaves = {
            name: leaf.clone() for name, leaf in state._asdict().items() if name != "position"
        }
        self.kind, self.h = type(state), state.k.shape[1]
        self.quant: KVQuant = memory.quant
        self.no_position = state.position.new_empty(len(state.k), 0)
        self.engine = engine
        self.per_slot = ("k", "v", "v_scale") if self.n else ("k", "v", "k_scale", "v_scale")

    @staticmethod
    def fits(state: Any, memory: Remembers) -> bool:
        """Whether all rows are at one place, with nothing dead among their slots."""
        slots = memory.stencil.slots
        if not isinstance(state, CodedCache) or memory.widths[0] != memory.widths[1]:
            return False
        if slots is None:
            return state.in_order
        return state.position.shape[1] == slots and bool(
            (state.position == state.position[:1]).all()
        )

    def attend(self, q: Tensor, kv: Tensor) -> Tensor:
        """Write one token's (b, 2 h, width), turned as they are coded; and attend to all that it
        sees, q (b, h, queries of a head, width)."""
        self._add(kv)
        if self._goes_round():
            return F.scaled_dot_product_attention(q, *self.memory.seen(self._full(), kv))
        attend = CODED_ATTENTION.pick(self.engine, q.device)
        return attend(q, self._coded(), self.place, self.quant)

    def _add(self, kv: Tensor) -> None:
        self._make_room()
        place, stencil, leaves = self.place, self.stencil, self.leaves
        slot = self._slot(place)
        k, v = kv[:, : self.h], kv[:, self.h :]
        if self.n:
            v_codes, v_scale = encode(v, self.quant)
            self._open(k, v)
        else:
            codes, scale = encode(kv, self.quant)
            v_codes, v_scale = codes[:, self.h :], scale[:, self.h :]
            leaves["k"].select(2, slot).copy_(codes[:, : self.h])
            leaves["k_scale"].select(2, slot).copy_(scale[:, : self.h])
        leaves["v"].select(2, slot).copy_(v_codes)
        leaves["v_scale"].select(2, slot).copy_(v_scale)
        if place < stencil.n_global:
            leaves["k_first"].select(2, place).copy_(k)
            leaves["v_first"].select(2, place).copy_(v)
        if self.n and place % self.n == self.n - 1:
            self._complete()
        self.place += 1

    def _slot(self, place: int) -> int:
        span, g = self.stencil.span, self.stencil.n_global
        return place if span is None or place < g else (place - g) % span + g

    def _make_room(self) -> None:
        """Double what is full, without a window."""
        leaves, place = self.leaves, self.place
        if self.stencil.slots is not None:
            return
        if place == leaves["k"].shape[2]:
            for name in self.per_slot:
                leaves[name] = F.pad(leaves[name], (0, 0, 0, max(SPARE, place)))
        if self.n and leaves["k_step"].shape[2] < leaves["k"].shape[2] // self.n:
            more = leaves["k"].shape[2] // self.n - leaves["k_step"].shape[2]
            for name in ("k_step", "k_least"):
                leaves[name] = F.pad(leaves[name], (0, 0, 0, more))

    def _open(self, k: Tensor, v: Tensor) -> None:
        """A token of the open group, exact; the slot of its key holds no code yet."""
        leaves, n = self.leaves, self.n
        if self.place % n == 0:
            leaves["k_open"].zero_()
            leaves["v_open"].zero_()
            if self.stencil.slots is not None:  # what was there is out of reach
                group = self.place // n % leaves["k_step"].shape[2]
                for name in ("k_step", "k_least"):
                    leaves[name].select(2, group).zero_()
        leaves["k_open"].select(2, self.place % n).copy_(k)
        leaves["v_open"].select(2, self.place % n).copy_(v)
        leaves["k"].select(2, self._slot(self.place)).zero_()

    def _complete(self) -> None:
        """Code the group whose last token has come; what of it has left a ring is dropped."""
        leaves, n, last = self.leaves, self.n, self.place
        codes, step, least = encode_channels(leaves["k_open"], self.quant)
        group, groups = last // n, leaves["k_step"].shape[2]
        leaves["k_step"].select(2, group % groups).copy_(step)
        leaves["k_least"].select(2, group % groups).copy_(least)
        first, span = last - n + 1, self.stencil.span
        lost = 0 if span is None else last - span + 1
        for place in range(first, last + 1):
            if place >= lost or place < self.stencil.n_global:
                leaves["k"].select(2, self._slot(place)).copy_(codes.select(2, place % n))

    def _goes_round(self) -> bool:
        """Whether slots, or groups, are not in order any more."""
        most = self.stencil.slots
        if most is None:
            return False
        if self.n:
            most = min(most, self.n * self.leaves["k_step"].shape[2])
        return self.place > most

    def _coded(self) -> Coded:
        leaves = self.leaves
        return Coded(
            leaves["k"],
            leaves["v"],
            leaves["k_step" if self.n else "k_scale"],
            leaves.get("k_least"),
            leaves["v_scale"],
            leaves["k_first"],
            leaves["v_first"],
            leaves.get("k_open"),
            leaves.get("v_open"),
        )

    def _full(self) -> CodedCache:
        """A ring that has been gone round, as a state that is read at once."""
        n, slots = self.place, self.stencil.slots
        assert slots is not None, "a ring"
        taken = {name: self.leaves[name][:, :, :n] for name in self.per_slot}
        for name in ("k_first", "v_first"):
            taken[name] = self.leaves[name][:, :, :n]
        position = self._positions()[:, : min(n, slots)]
        return self.kind(**{**self.leaves, **taken}, position=position)

    def _positions(self) -> Tensor:
        """(b, slots) of a ring."""
        span, g, slots = self.stencil.span, self.stencil.n_global, self.stencil.slots
        assert span is not None, "a ring"
        assert slots is not None, "a ring"
        slot, last = torch.arange(slots, device=self.no_position.device), self.place - 1
        position = last - (last - slot) % span
        position = torch.where((slot < g) & (slot <= last), slot, position)
        dead = (position < 0) | ((slot >= g) & (position < g)) | ((slot < g) & (slot > last))
        return position.masked_fill(dead, -1).expand(len(self.no_position), -1)

    def value(self) -> CodedCache:
        leaves = {name: leaf.clone() for name, leaf in self.leaves.items()}
        if self.stencil.slots is not None:
            return self.kind(**leaves, position=self._positions().clone())
        leaves |= {name: self.leaves[name][:, :, : self.place].clone() for name in self.per_slot}
        if self.n:
            kept = self.place // self.n
            leaves |= {x: self.leaves[x][:, :, :kept].clone() for x in ("k_step", "k_least")}
        return self.kind(**leaves, position=self.no_position)
