"""Attention that codes its keys by channel, a group of tokens together.

    group   of a token: position // n, for groups of n tokens of one document
    open    the group of the latest token; it is kept as it is

A query sees its own group as it is and earlier ones in codes. The keys of a group are coded once,
when its last token has come, so both forms agree, and any split of a sequence. Values are coded
token by token, and a stencil's first positions not at all, as in `memory`.

Source: Liu et al. 2024 (KIVI), arXiv:2402.02750, section 3.2.
Differs: a query sees no more than its own group in full; values, too, by groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.attention.cache import (
    Layout,
    add_slot,
    append,
    empty_cache,
)
from kizzasi.models.attention.grouped_state import (
    Fresh,
    GroupedState,
    New,
    of_groups,
    put,
    take,
)
from kizzasi.models.attention.memory import Read, turning
from kizzasi.models.call import Call
from kizzasi.models.ops.devices import answers
from kizzasi.models.ops.kv_codes import (
    KVQuant,
    code_bytes,
    decode,
    decode_channels,
    encode,
    encode_channels,
    groups_of,
    scale_dtype,
    straight_through,
    turn,
)
from kizzasi.models.ops.stencil import Places, Stencil


class GroupedMemory:
    """Keys and values of a layer; as `Memory`.

    Args:
        n: tokens of a group.
    """

    turns_keys = False

    def __init__(
        self,
        n_kv_heads: int,
        widths: tuple[int, int],
        stencil: Stencil,
        quant: KVQuant,
        n: int,
    ) -> None:
        self.n_kv_heads, self.widths, self.stencil, self.n = n_kv_heads, widths, stencil, n
        self.quant: KVQuant = quant

    def state_bytes(self, tokens: int, n_bytes: int = 4) -> int:
        """Of one row after so many tokens with their positions apart, floats of so many bytes."""
        slots = self.stencil.slots
        slots = tokens if slots is None else slots
        k, v = self.widths
        each = code_bytes(k, self.quant) + code_bytes(v, self.quant) + 2 * groups_of(v)[0]
        exact = (self.n + self.stencil.n_global) * (k + v)
        both = slots * each + self._groups(slots) * 2 * k * 2 + exact * n_bytes
        return self.n_kv_heads * both

    def _groups(self, slots: int) -> int:
        """How many groups may have tokens in so many slots, the open one aside."""
        span = self.stencil.span
        return slots // self.n if span is None else (span - 1) // self.n + 2

    def empty(
        self, batch: int, slots: int, device: torch.device | None, dtype: torch.dtype | None
    ) -> GroupedState:
        """A cache of dead slots."""
        heads, (k, v), g = self.n_kv_heads, self.widths, self.stencil.n_global
        plain = empty_cache(batch, heads, slots, (0, 0), device, dtype)
        like = plain.k

        def zeros(n: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
            return like.new_zeros(batch, heads, n, width, dtype=dtype)

        made = scale_dtype(like.dtype)
        codes = (zeros(slots, code_bytes(w, self.quant), torch.uint8) for w in (k, v))
        groups = (zeros(self._groups(slots), k, made) for _ in range(2))
        exact = zeros(self.n, k), zeros(self.n, v), zeros(g, k), zeros(g, v)
        scale = zeros(slots, groups_of(v)[0], made)
        return GroupedState._make((*codes, scale, *groups, *exact, plain.position))

    def turning(self, call: Call, like: Tensor) -> Tensor | None:
        """The rotation that values are coded in."""
        return turning(call, like, self.widths[1])

    def enter(self, k: Tensor, v: Tensor, position: Tensor, by: Tensor | None = None) -> New:
        """New keys and values (b, n_kv_heads, t, width), of a step; see `Memory.enter`."""
        v = v if by is None else turn(v, by)
        codes = k.new_zeros(*k.shape[:3], code_bytes(k.shape[3], self.quant), dtype=torch.uint8)
        return New(k, v, (codes, *encode(v, self.quant)), None)

    def seen(self, state: GroupedState, like: Tensor) -> tuple[Tensor, Tensor]:
        """(b, n_kv_heads, s, width) keys and values that the last token sees, in a dtype."""
        k = self._coded_keys(state, like.dtype)
        whole, s = k.shape[2], state.k.shape[2]
        v = self._coded_values(state, whole, like.dtype)
        open_ = [x.to(like.dtype) for x in state[5:7]]
        if state.in_order:
            k, v = (
                torch.cat([x, own[:, :, : s - whole]], 2)
                for x, own in zip((k, v), open_, strict=True)
            )
        else:
            position, last = state.positions(), state.next_position()[:, None] - 1
            mine = ((position // self.n == last // self.n) & (position >= 0))[:, None, :, None]
            k, v = (
                torch.where(mine, take(own, position % self.n), x)
                for x, own in zip((k, v), open_, strict=True)
            )
        return self._exact_first(k, state.k_first), self._exact_first(v, state.v_first)

    def _coded_values(self, state: GroupedState, slots: int, dtype: torch.dtype) -> Tensor:
        """Values of the first so many slots as their codes say."""
        codes, scale = state.v[:, :, :slots], state.v_scale[:, :, :slots]
        return decode(codes, scale, self.quant, self.widths[1], dtype)

    def _exact_first(self, x: Tensor, first: Tensor) -> Tensor:
        g = first.shape[2]
        return torch.cat([first.to(x.dtype), x[:, :, g:]], 2) if g and x.shape[2] else x

    def _coded_keys(self, state: GroupedState, dtype: torch.dtype) -> Tensor:
        """Keys of all slots as their codes say, zero for dead ones; where slots are in order, those
        before the open group alone: the group that the last token has completed is open."""
        n, s = self.n, state.k.shape[2]
        if state.in_order:
            groups = max(s - 1, 0) // n
            codes = state.k[:, :, : groups * n].unflatten(2, (groups, n))
            step, least = (x[:, :, :groups, None] for x in state[3:5])
            return decode_channels(codes, step, least, self.quant, dtype).flatten(2, 3)
        position = state.positions()
        group = position.clamp(min=0) // n % max(state.k_step.shape[2], 1)
        if not state.k_step.shape[2]:  # nothing is complete
            return state.k_open.new_zeros(*state.k.shape[:3], self.widths[0], dtype=dtype)
        step, least = (take(x, group) for x in state[3:5])
        k = decode_channels(state.k, step, least, self.quant, dtype)
        return k.masked_fill((position < 0)[:, None, :, None], 0.0)

    def read(
        self, sight: Layout, before: GroupedState, k: Tensor, v: Tensor, by: Tensor | None = None
    ) -> Read:
        """What a call sees of the cache before it and of its own tokens; see `Memory.read`."""
        v = v if by is None else turn(v, by)
        t, g = k.shape[2], self.stencil.n_global
        v_codes, v_scale = encode(v, self.quant)
        read_v = decode(v_codes, v_scale, self.quant, v.shape[-1], v.dtype)
        fresh = self._fresh(sight, before, k, v)
        past_k, *past_own, past_codes = self._past(sight, before, fresh, k.dtype)
        new_k = fresh.coded[:, :, -t:]
        if g:
            first = (sight.position < g)[:, None, :, None]
            read_v = torch.where(first, v.detach(), read_v)
            new_k = torch.where(first, k, new_k)
        past_v = self._coded_values(before, before.v.shape[2], v.dtype)
        firsts = zip((past_k, past_v), before[7:9], strict=True)
        past = tuple(self._exact_first(x, first) for x, first in firsts)
        codes = append(past_codes, fresh.codes[:, :, -t:])
        leaves = codes, append(before.v, v_codes), append(before.v_scale, v_scale)
        keys, values = append(past[0], new_k), append(past[1], straight_through(v, read_v))
        own_k, own_v = map(append, past_own, (k, v))
        new = New(k, v, leaves, fresh)
        return Read(keys, values, (own_k, own_v, self.n), (past[0], past[1]), new)

    def _past(
        self, sight: Layout, before: GroupedState, fresh: Fresh, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the slots: keys as later groups see them, keys and values as their own does, codes."""
        t, s = sight.position.shape[1], before.k.shape[2]
        old, n_open = self._coded_keys(before, dtype), fresh.k.shape[2] - t
        if sight.alike:
            # A group that was open though complete has its codes: it is read from them.
            done = s - n_open
            if done > old.shape[2]:
                whole = before._replace(k=F.pad(before.k[:, :, :done], (0, 0, 0, 1)))
                old = self._coded_keys(whole, dtype)
            own = fresh.k[:, :, :n_open], fresh.v[:, :, :n_open]
            joined = append(old, fresh.coded[:, :, :n_open])
            return joined, *own, append(before.k[:, :, :done], fresh.codes[:, :, :n_open])
        position, following = before.positions(), before.next_position()[:, None]
        if before.in_order and s:
            old = self._coded_keys(before._replace(position=position.contiguous()), dtype)
        zero = old.new_zeros(())
        open_ = (position >= following - following % self.n)[:, None, :, None]
        there = (position - following + self.n).clamp(0, self.n - 1)
        parts = (fresh.coded, fresh.k, fresh.v, fresh.codes)
        seen, own_k, own_v, codes = (
            torch.where(open_, take(part[:, :, :n_open], there), rest)
            for part, rest in zip(parts, (old, zero, zero, before.k), strict=True)
        )
        return seen, own_k, own_v, codes

    def _fresh(self, sight: Layout, before: GroupedState, k: Tensor, v: Tensor) -> Fresh:
        """Join the open group to a call's tokens, and code the groups that are complete."""
        n, i = self.n, torch.arange(self.n, device=k.device)
        open_ = torch.stack([before.k_open, before.v_open]).to(k.dtype)
        if sight.alike:
            fill = before.k.shape[2] % n
            position = sight.position[:, :1] - fill + i[:fill]
            document, open_ = torch.zeros_like(position), open_[:, :, :, :fill]
        else:
            following = before.next_position()[:, None].expand(len(k), -1)
            fill = following % n
            document = torch.where(i >= n - fill, 0, -1)
            position = (following - n + i).clamp(min=0)
            open_ = torch.stack([take(x, (i + fill) % n) for x in open_])
        rows = len(document)
        document = torch.cat([document, sight.document.expand(rows, -1)], 1)
        position = torch.cat([position, sight.position.expand(rows, -1)], 1)
        k, v = (torch.cat(x, 2) for x in zip(open_, (k, v), strict=True))
        return self._code(document, position, k, v, sight.alike)

    def _code(
        self, document: Tensor, position: Tensor, k: Tensor, v: Tensor, aligned: bool
    ) -> Fresh:
        """Code what is complete of tokens whose groups are not interrupted.

        aligned: they begin with a group, and are of one document.
        """
        n, total = self.n, k.shape[2]
        most, i = total // n, torch.arange(total, device=k.device)
        if aligned:
            there = slice(n - 1, most * n, n)
            codes, step, least = encode_channels(
                k[:, :, : most * n].unflatten(2, (most, n)), self.quant
            )
            read = self._decoded(codes, step, least, k.dtype)
            codes, read = (
                F.pad(x, (0, 0, 0, total - most * n)) for x in (codes.flatten(2, 3), read)
            )
            head = straight_through(k[:, :, : most * n], read[:, :, : most * n])
            read = torch.cat([head, read[:, :, most * n :]], 2)
            group, of = position[:, there] // n, document[:, there]
            return Fresh(document, position, k, v, codes, read, step, least, group, of)
        begun = (i - (n - 1)).clamp(min=0)
        whole = (document >= 0) & (document[:, begun] == document) & (i >= n - 1)
        ends = (position % n == n - 1) & whole
        last = (~ends).long().argsort(dim=1, stable=True)[:, :most]
        there = ends.gather(1, last)
        begin = (last - (n - 1)).clamp(min=0)
        tokens = (begin[..., None] + i[:n]).flatten(1)
        codes, step, least = encode_channels(take(k, tokens).unflatten(2, (-1, n)), self.quant)
        read = self._decoded(codes, step, least, k.dtype)
        if not most:
            zero = codes.new_zeros(*k.shape[:3], codes.shape[-1])
            none = document[:, :0]
            return Fresh(
                document, position, k, v, zero, torch.zeros_like(k), step, least, none, none
            )
        mine = (ends.cumsum(1) - ends.long()).clamp(max=most - 1)
        place = i - begin.gather(1, mine)
        coded = there.gather(1, mine) & (place >= 0) & (place < n)
        coded = coded[:, None, :, None]
        index = (mine * n + place).clamp(0, most * n - 1)
        codes = torch.where(coded, take(codes.flatten(2, 3), index), 0)
        read = torch.where(coded, straight_through(k, take(read, index)), 0.0)
        of = torch.where(there, document.gather(1, last), -2)
        group = position.gather(1, last) // n
        return Fresh(document, position, k, v, codes, read, step, least, group, of)

    def _decoded(self, codes: Tensor, step: Tensor, least: Tensor, dtype: torch.dtype) -> Tensor:
        """(b, h, N n, width) of codes (b, h, N, n, bytes)."""
        about = step.unsqueeze(-2), least.unsqueeze(-2)
        return decode_channels(codes, *about, self.quant, dtype).flatten(2, 3)

    def keep(self, sight: Layout, before: GroupedState, read: Read) -> GroupedState:
        """The cache after a call, laid out so, that read so."""
        new: New = read.new
        fresh, n, g = new.fresh, self.n, self.stencil.n_global
        assert fresh is not None, "of a call"
        leaves, position = sight.kept(new.leaves, self.stencil)
        last = sight.last[:, None]
        # Keys of the group that is open now, where they stand among the latest tokens.
        place = torch.arange(n, device=last.device)
        back = (last - last // n * n) - place
        total = fresh.k.shape[2]
        place = (total - 1 - back).clamp(0, total - 1)
        gone = ((back < 0) | (last < 0))[:, None, :, None]
        open_ = (take(x, place).masked_fill(gone, 0.0) for x in (fresh.k, fresh.v))
        about = self._about(sight, before, fresh, self._groups(leaves[0].shape[2]))
        first = before[7:9]
        if g:
            assert sight.ring is not None, "first positions have a ring"
            of_first = sight.ring.of_first(g)
            joined = map(append, read.past, (new.k, new.v))
            first = tuple(of_first.take(x) for x in joined)
        return GroupedState._make((*leaves, *about, *open_, *first, position))

    def _about(
        self, sight: Layout, before: GroupedState, fresh: Fresh, groups: int
    ) -> tuple[Tensor, Tensor]:
        """Steps and least entries of the groups that are kept, zero for all others."""
        last, n, slot = sight.last[:, None], self.n, torch.arange(groups, device=sight.last.device)
        kept, held = fresh.of == sight.document[:, -1:], slot[None]
        if self.stencil.slots is not None:
            kept = kept & (fresh.group > last // n - groups)
            held = last // n - (last // n - slot) % groups
        dead = ((held < 0) | (held >= (last + 1) // n))[:, None, :, None]
        where = torch.where(kept, fresh.group % max(groups, 1), groups)
        step, least = (
            put(of_groups(old, groups + 1), where, x)[:, :, :groups].masked_fill(dead, 0.0)
            for old, x in zip(before[3:5], (fresh.step, fresh.least), strict=True)
        )
        return step, least

    def add(self, state: GroupedState, new: New, now: Tensor) -> GroupedState:
        """The cache with one more token, at `now` (b, 1)."""
        n, g, first = self.n, self.stencil.n_global, state[7:9]
        leaves, position = add_slot(state[:3], new.leaves, state.position, now, self.stencil)
        begins, done = now % n == 0, now % n == n - 1
        open_ = [
            put(old.to(x.dtype).masked_fill(begins[:, None, :, None], 0.0), now % n, x)
            for old, x in zip(state[5:7], (new.k, new.v), strict=True)
        ]
        if g:
            index, early = now.clamp(max=g - 1), (now < g)[:, None, :, None]
            first = tuple(
                torch.where(early, put(old.to(x.dtype), index, x), old.to(x.dtype))
                for old, x in zip(first, (new.k, new.v), strict=True)
            )
        groups = self._groups(leaves[0].shape[2])
        about = tuple(of_groups(x, groups) for x in state[3:5])
        if self.stencil.slots is not None and not (answers(now) and not begins.any()):
            gone = begins & (torch.arange(groups, device=now.device) == now // n % groups)
            about = tuple(x.masked_fill(gone[:, None, :, None], 0.0) for x in about)
        after = GroupedState._make((*leaves, *about, *open_, *first, position))
        return after if answers(now) and not done.any() else self._complete(after, now, done)

    def _complete(self, state: GroupedState, now: Tensor, done: Tensor) -> GroupedState:
        """Code the open group of rows that are done with it."""
        n, groups = self.n, state.k_step.shape[2]
        if not groups:
            return state
        codes, step, least = encode_channels(state.k_open, self.quant)
        slot = torch.where(done, now // n % groups, groups)
        about = (
            put(of_groups(old, groups + 1), slot, x.unsqueeze(2))[:, :, :groups]
            for old, x in zip(state[3:5], (step, least), strict=True)
        )
        position = state.positions()
        mine = done & (position >= 0) & (position // n == now // n)
        k = torch.where(mine[:, None, :, None], take(codes, position % n), state.k)
        k_step, k_least = about
        return state._replace(k=k, k_step=k_step, k_least=k_least)


def beside_own(
    call: Call, sight: Layout, stencil: Stencil, read: Read
) -> tuple[Tensor, Tensor, Tensor, Places]:
    """All keys, and those that may be of a query's own group once more, as they are: keys, values,
    (b or 1, 1, t, keys) which are seen, made once for all layers of a call, and where they are."""
    assert read.own is not None, "of groups"
    own_k, own_v, n = read.own
    s = read.keys.shape[2]
    late = s - own_k.shape[2]

    def make() -> tuple[Tensor, Places]:
        query, key = sight.query, sight.key
        same = key.position[:, None] // n == query.position[:, :, None] // n
        visible = stencil.visible(query, key)
        shown, alone = visible & ~same[:, None], visible & same[:, None]
        place = Places(*(torch.cat([x, x[:, late:]], 1) for x in key))
        return torch.cat([shown, alone[..., late:]], -1), place

    seen, key = call.once(("beside own", s, late, n, stencil), make)
    keys, values = torch.cat([read.keys, own_k], 2), torch.cat([read.values, own_v], 2)
    return keys, values, seen, key
