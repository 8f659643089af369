"""Attention whose keys and values are written where they will be read.

room   slots that a store has; those from `n` on are free
place  position of the token, the same in every row
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.call import Call
from kizzasi.models.decoding.inplace.base import About, Steps, direct, side_by_side
from kizzasi.models.decoding.own_cache import SPARE
from kizzasi.models.kv_cache import AttentionState
from kizzasi.models.mixers.attention import Attention, AttentionSpec
from kizzasi.models.ops.rope import rotate
from kizzasi.models.rope_scaling import Rotary

PLACES = 64  # whose tables are made at once
READ = ("n_kv_heads", "head_dim", "window", "position", "rope_theta", "rope_dims", "rope_scaling")
READ += ("qk_norm", "qk_norm_eps", "qk_norm_kind", "qkv_bias", "out_bias")


class Store:
    """Keys and values (b, h, room, width) of rows that are all at one place.

    Without a window slot i holds position i, and the store doubles when it is full; with one it is
    a ring, position p in slot p % window.
    """

    def __init__(self, state: AttentionState, window: int | None) -> None:
        self.window = window
        self.place = int(state.next_position()[0])
        self.k, self.v = state.k.clone(), state.v.clone()
        self.no_position = state.position.new_empty(len(state.k), 0)

    @staticmethod
    def fits(state: Any, window: int | None) -> bool:
        """Whether all rows are at one place, with nothing dead among their slots."""
        if not isinstance(state, AttentionState):
            return False
        if window is None:
            return state.in_order
        return state.position.shape[1] == window and bool(
            (state.position == state.position[:1]).all()
        )

    def add(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token, k and v (b, h, width). Returns all that it sees, (b, h, s, width)."""
        slot, place = self.place, self.place
        if self.window is not None:
            slot = place % self.window
        elif place == self.k.shape[2]:
            spare = max(SPARE, place)
            self.k, self.v = (F.pad(part, (0, 0, 0, spare)) for part in (self.k, self.v))
        self.k.select(2, slot).copy_(k)
        self.v.select(2, slot).copy_(v)
        self.place = n = place + 1
        if self.window is not None and n >= self.window:
            return self.k, self.v
        return self.k[:, :, :n], self.v[:, :, :n]

    def value(self) -> AttentionState:
        if self.window is None:
            n = self.place
            return AttentionState(
                self.k[:, :, :n].clone(), self.v[:, :, :n].clone(), self.no_position
            )
        last = self.place - 1
        slot = torch.arange(self.window, device=self.k.device)
        position = (last - (last - slot) % self.window).clamp(min=-1)
        rows = position.expand(len(self.k), -1).clone()
        return AttentionState(self.k.clone(), self.v.clone(), rows)


class Turns:
    """Cosines and sines of one place after another, made for many at a time."""

    def __init__(self, rotary: Rotary, like: Tensor) -> None:
        self.rotary, self.like = rotary, like
        self.begin, self.end, self.place = 0, 0, -1
        self.now: tuple[Tensor, Tensor] | None = None

    def at(self, place: int) -> tuple[Tensor, Tensor]:
        """(1, n_rotated) each."""
        if self.now is None or place != self.place:
            if not self.begin <= place < self.end:
                self.begin, self.end = place, place + PLACES
                position = torch.arange(self.begin, self.end, device=self.like.device)[None]
                tables = self.rotary.tables(
                    Call((1, PLACES), position.device), "", position, self.like.dtype
                )
                self.tables = [table[0, 0] for table in tables]
            i = place - self.begin
            cos, sin = self.tables
            self.place, self.now = place, (cos[i : i + 1], sin[i : i + 1])
        return self.now


class AttentionSteps(Steps):
    """`Attention.recurrent` for the options named in `READ`, and all rows at one place."""

    def __init__(self, mixer: Attention, state: AttentionState, turns: Turns) -> None:
        spec = mixer.spec
        self.h, self.h_kv, self.d = spec.n_heads, spec.kv_heads, mixer.head_dim
        self.store = Store(state, spec.window)
        self.enter = side_by_side(mixer.q_proj, mixer.k_proj, mixer.v_proj)
        self.leave = direct(mixer.o_proj)
        self.norms = mixer.q_norm, mixer.k_norm
        self.turns = turns if spec.position == "rope" else None

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        b, h, h_kv, d = len(x), self.h, self.h_kv, self.d
        heads = self.enter(x).view(b, h + 2 * h_kv, d)
        qk, v = heads.split([h + h_kv, h_kv], 1)
        norm_q, norm_k = self.norms
        if norm_q is not None and norm_k is not None:
            q, k = qk.split([h, h_kv], 1)
            q = norm_q.forward(q.reshape(b, -1, norm_q.d)).view(b, h, d)
            k = norm_k.forward(k.reshape(b, -1, norm_k.d)).view(b, h_kv, d)
            qk = torch.cat([q, k], 1)
        if self.turns is not None:
            qk = rotate(qk, *self.turns.at(self.store.place))
        q, k = qk.split([h, h_kv], 1)
        k, v = self.store.add(k, v)
        # Queries that share keys stand in for tokens: none of them is later than any key.
        y = F.scaled_dot_product_attention(q.reshape(b, h_kv, h // h_kv, d), k, v)
        return self.leave(y.reshape(b, h * d))

    def value(self) -> AttentionState:
        return self.store.value()


def attention_steps(mixer: Attention, state: Any, about: About) -> Steps | None:
    """None for options that are not in `READ`, for rows at several places, and other engines."""
    spec = mixer.spec
    read = AttentionSpec(spec.n_heads, **{name: getattr(spec, name) for name in READ})
    known = spec == read and spec.position in ("rope", "none")
    if (
        not (known and mixer.engine in ("auto", "torch"))
        or not Store.fits(state, spec.window)
        or state.k.dtype != about.dtype
    ):
        return None
    key = f"turns {mixer.rotary.name}"
    turns = about.shared.setdefault(key, Turns(mixer.rotary, state.k))
    return AttentionSteps(mixer, state, turns)
