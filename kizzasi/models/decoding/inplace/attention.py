"""Attention whose keys and values are written where they will be read.

room   slots that a store has; those from `n` on are free
place  position of the token, the same in every row
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.attention.cache import AttentionState
from kizzasi.models.attention.rope_scaling import Rotary
from kizzasi.models.call import Call
from kizzasi.models.decoding.inplace.base import About, Products, Steps, Unfit, write_norm
from kizzasi.models.decoding.inplace.codes import CodedCache, CodedStore
from kizzasi.models.decoding.own_cache import SPARE
from kizzasi.models.mixers.attention import Attention, AttentionSpec
from kizzasi.models.norm import Norm
from kizzasi.models.ops.kv_codes import hadamard, turn

if TYPE_CHECKING:
    from kizzasi.models.ops.native.steps import Program

PLACES = 64  # whose tables are made at once
READ = ("n_kv_heads", "head_dim", "window", "position", "rope_theta", "rope_dims", "rope_scaling")
READ += ("qk_norm", "qk_norm_eps", "qk_norm_kind", "qkv_bias", "out_bias")
READ += ("n_global", "kv_quant", "kv_group")


class Store:
    """Keys and values of rows that are all at one place: (b, 2 h, room, width), keys first.

    Without a window slot i holds position i, and the store doubles when it is full; with one it is
    a ring after the first n_global positions.
    """

    def __init__(self, state: AttentionState, window: int | None, n_global: int = 0) -> None:
        self.window, self.h, self.g = window, state.k.shape[1], n_global
        self.place = int(state.next_position()[0])
        self.slots = torch.cat([state.k, state.v], 1)
        self.no_position = state.position.new_empty(len(state.k), 0)

    @staticmethod
    def fits(state: Any, window: int | None, n_global: int = 0) -> bool:
        """Whether all rows are at one place, with nothing dead among their slots."""
        if not isinstance(state, AttentionState) or state.k.shape[3] != state.v.shape[3]:
            return False
        if window is None:
            return state.in_order
        return state.position.shape[1] == window + n_global and bool(
            (state.position == state.position[:1]).all()
        )

    def attend(self, q: Tensor, kv: Tensor) -> Tensor:
        """`add`, and attend to what is seen, q (b, h, queries of a head, width)."""
        return F.scaled_dot_product_attention(q, *self.add(kv))

    def add(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token's (b, 2 h, width). Returns keys and values that it sees, (b, h, s,
        width)."""
        slot, place, h = self.place, self.place, self.h
        if self.window is not None:
            slot = place if place < self.g else (place - self.g) % self.window + self.g
        elif place == self.slots.shape[2]:
            self.make_room(1)
        self.slots.select(2, slot).copy_(kv)
        self.place = n = place + 1
        if self.window is not None and n > self.window + self.g:
            n = self.window + self.g
        return self.slots[:, :h, :n], self.slots[:, h:, :n]

    def make_room(self, tokens: int) -> None:
        """For so many more."""
        left = self.slots.shape[2] - self.place
        if self.window is None and left < tokens:
            self.slots = F.pad(self.slots, (0, 0, 0, max(SPARE, self.place, tokens - left)))

    def value(self) -> AttentionState:
        k, v = self.slots[:, : self.h], self.slots[:, self.h :]
        if self.window is None:
            n = self.place
            return AttentionState(k[:, :, :n].clone(), v[:, :, :n].clone(), self.no_position)
        last = self.place - 1
        slot, g = torch.arange(self.window + self.g, device=k.device), self.g
        position = last - (last - slot) % self.window
        position = position.masked_fill(position < g, -1)
        position = torch.where(slot < g, torch.where(slot <= last, slot, -1), position)
        return AttentionState(k.clone(), v.clone(), position.expand(len(k), -1).clone())


class Turns:
    """Cosines and sines of one place after another, made for many at a time."""

    def __init__(self, rotary: Rotary, like: Tensor) -> None:
        self.rotary, self.like = rotary, like
        self.begin, self.end, self.place = 0, 0, -1
        self.now: tuple[Tensor, Tensor] | None = None
        self.tables: list[Tensor] = []

    def at(self, place: int) -> tuple[Tensor, Tensor]:
        """(1, n_rotated) each."""
        if self.now is None or place != self.place:
            if not self.begin <= place < self.end:
                self.since(place)
            i = place - self.begin
            cos, sin = self.tables
            self.place, self.now = place, (cos[i : i + 1], sin[i : i + 1])
        return self.now

    def since(self, place: int) -> list[Tensor]:
        """(PLACES, n_rotated) each, from this place on."""
        if self.begin != place or self.end == 0:
            self.begin, self.end = place, place + PLACES
            position = torch.arange(self.begin, self.end, device=self.like.device)[None]
            call = Call((1, PLACES), position.device)
            tables = self.rotary.tables(call, "", position, self.like.dtype)
            self.tables = [table[0, 0].contiguous() for table in tables]
        return self.tables


class AttentionSteps(Steps):
    """`Attention.recurrent` for the options named in `READ`, and all rows at one place."""

    def __init__(
        self,
        mixer: Attention,
        norms: tuple[Norm, Norm] | None,
        store: Store | CodedStore,
        turns: Turns,
        products: Products,
        dtype: torch.dtype,
    ) -> None:
        spec = mixer.spec
        self.h, self.h_kv, self.d = spec.n_heads, spec.kv_heads, mixer.head_dim
        self.store = store
        self.by: Tensor | None = None
        self.by_key: Tensor | None = None
        if spec.coded:
            place = {"device": store.no_position.device, "dtype": dtype}
            self.by = hadamard(self.d, **place)
            self.by_key = self.by if mixer.memory.turns_keys else None
        self.enter = products.of(mixer.q_proj, mixer.k_proj, mixer.v_proj)
        self.leave = products.of(mixer.o_proj)
        self.norms = norms
        self.program: Program | None = None
        self.turns = turns if spec.position == "rope" else None

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        b, h, h_kv, d = len(x), self.h, self.h_kv, self.d
        heads = self.enter(x).view(b, h + 2 * h_kv, d)
        if self.norms is not None:
            norm_q, norm_k = self.norms
            q, k, v = heads.split_with_sizes([h, h_kv, h_kv], 1)
            q = norm_q(q.reshape(b, -1, norm_q.d)).view(b, h, d)
            k = norm_k(k.reshape(b, -1, norm_k.d)).view(b, h_kv, d)
            heads = torch.cat([q, k, v], 1)
        if self.turns is not None:
            cos, sin = self.turns.at(self.store.place)
            n = cos.shape[-1]
            turned = heads[:, : h + h_kv] if n == d else heads[:, : h + h_kv, :n]
            rolled = turned.roll(n // 2, -1)
            turned.mul_(cos).addcmul_(rolled, sin)
        if self.by is not None:
            heads = self._turned(heads, self.by)
        # Queries that share keys stand in for tokens: none of them is later than any key.
        y = self.store.attend(heads[:, :h].reshape(b, h_kv, h // h_kv, d), heads[:, h:])
        y = y if self.by is None else turn(y, self.by)
        return self.leave(y.reshape(b, h * d))

    def write(self, program: Program, x: Tensor) -> Tensor:
        store, (h, h_kv, d) = self.store, (self.h, self.h_kv, self.d)
        if not isinstance(store, Store) or not program.starts_at(store.place):
            raise Unfit
        heads = self.enter.write(program, x, "queries, keys, values")
        if self.norms is not None:
            q, k, _ = heads.split_with_sizes([h * d, h_kv * d, h_kv * d], 1)
            for norm, part in zip(self.norms, (q, k), strict=True):
                write_norm(norm, program, part, part)
        y = program.room("attended", h * d)
        n = 0 if self.turns is None else self.turns.rotary.n_rotated
        move = program.attend(heads, y, (h, h_kv, d), n, store.window or 0, store.g)

        def prepare() -> None:
            self.program, store.place = program, program.place
            store.make_room(PLACES)
            move(store.slots, [] if self.turns is None else self.turns.since(program.place))

        program.every(PLACES, prepare)
        return self.leave.write(program, y, "mixed")

    def _turned(self, heads: Tensor, by: Tensor) -> Tensor:
        """(b, h + 2 h_kv, d) as they are coded: all, or the values alone."""
        if self.by_key is not None:
            return turn(heads, by)
        n = self.h + self.h_kv
        return torch.cat([heads[:, :n], turn(heads[:, n:], by)], 1)

    def value(self) -> AttentionState | CodedCache:
        if self.program is not None:
            self.store.place = self.program.place
        return self.store.value()


def attention_steps(mixer: Attention, state: Any, about: About) -> Steps | None:
    """None for options that are not in `READ`, for rows at several places, and other engines."""
    spec = mixer.spec
    read = AttentionSpec(spec.n_heads, **{name: getattr(spec, name) for name in READ})
    known = spec == read and spec.position in ("rope", "none")
    if not (known and mixer.engine in ("auto", "torch")):
        return None
    if spec.coded and CodedStore.fits(state, mixer.memory):
        dtype = state.k_first.dtype
        store = CodedStore(state, mixer.memory, mixer.engine)
    elif not spec.coded and Store.fits(state, spec.window, spec.n_global):
        dtype, store = state.k.dtype, Store(state, spec.window, spec.n_global)
    else:
        return None
    if dtype != about.dtype:
        return None
    q_norm, k_norm, norms = mixer.q_norm, mixer.k_norm, None
    if q_norm is not None:
        if not isinstance(q_norm, Norm) or not isinstance(k_norm, Norm):
            return None
        norms = q_norm, k_norm
    key = f"turns {mixer.rotary.name}"
    like = state.position.new_empty(0, dtype=dtype)  # a projection may be no plain Linear
    turns = about.shared.setdefault(key, Turns(mixer.rotary, like))
    return AttentionSteps(mixer, norms, store, turns, about.products, dtype)
