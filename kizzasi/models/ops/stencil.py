"""Which positions a query sees, and attention that pays for those alone.

    t, s     queries, keys; the queries are the last t keys
    span     how far back a query sees, its own position included
    c, m     queries of a block, and how many blocks before its own it looks into
    n, r     blocks of a sequence; r = dilation, a sequence falls into r interleaved ones

Source: windows, dilation and global positions: Beltagy et al. 2020, arXiv:2004.05150, section 3.1.
Blocks: Child et al. 2019, arXiv:1904.10509. The first positions as sinks: Xiao et al. 2023,
arXiv:2309.17453.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.ops.attention import attention, attention_ref, visibility
from kizzasi.models.ops.engines import Engines

SMALL = 16  # queries of a block at least
LARGE = 64  # from this span on, blocks of half a span: 1.5 spans of keys each instead of 2
# Document and position of what fills up the first block, and the last one: there, it sees itself.
BEFORE, AFTER = -2, 1 << 40

Bias = Callable[[Tensor], Tensor]


class Places(NamedTuple):
    """document and position, (b, n) of tokens or slots, or (1, n); see `ops.attention`."""

    document: Tensor
    position: Tensor


class Plan(NamedTuple):
    """How attention is cut up: n blocks of c queries in each of r sequences, m blocks back, and
    n_global keys beside those of the blocks."""

    n: int
    c: int
    r: int
    m: int
    n_global: int

    @property
    def n_queries(self) -> int:
        """Of all blocks, those that fill up the last one included."""
        return self.n * self.c * self.r

    @property
    def n_keys(self) -> int:
        """That each query is multiplied with."""
        return (self.m + 1) * self.c + self.n_global


class Stencil(NamedTuple):
    """Who sees whom among the positions of a document.

    window    positions that a query sees, its own included; None means all.
    dilation  every so many positions back one is seen.
    block     positions of a block; a query sees its own block,
    n_blocks  and so many of them, its own included. None means all.
    n_global  the first positions, which all later ones see besides.
    causal    no later position is seen; False: a window reaches as far ahead.
    """

    window: int | None = None
    dilation: int = 1
    block: int | None = None
    n_blocks: int = 1
    n_global: int = 0
    causal: bool = True

    @property
    def span(self) -> int | None:
        """Positions from the query's own back that may be seen, the first ones aside."""
        if self.window is not None:
            return (self.window - 1) * self.dilation + 1
        return None if self.block is None else self.block * self.n_blocks

    @property
    def slots(self) -> int | None:
        """Of the ring that remembers them, the first ones in front; None: all are kept."""
        return None if self.span is None else self.span + self.n_global

    def slot(self, position: Tensor) -> Tensor:
        """Where the ring keeps a position."""
        assert self.span is not None, "a ring"
        slot = (position - self.n_global) % self.span + self.n_global
        return torch.where(position < self.n_global, position, slot) if self.n_global else slot

    def covers(self, t: int) -> bool:
        """Whether the first t positions see all that came before them."""
        return self.dilation == 1 and (self.span is None or t <= self.span)

    def visible(self, query: Places, key: Places) -> Tensor:
        """(b, 1, t, s) bool."""
        if self.dilation == 1 and self.block is None and not self.n_global:
            return visibility(*query, *key, self.window, self.causal)
        seen = visibility(*query, *key, causal=self.causal)
        return seen & (self._near(query.position, key.position))[:, None]

    def _near(self, query: Tensor, key: Tensor) -> Tensor:
        """(b, t, s) bool, of an earlier key of the same document."""
        age = query[:, :, None] - key[:, None]
        near = age % self.dilation == 0
        if self.window is not None:
            near = near & (age < self.window * self.dilation)
        if self.block is not None:
            back = (query // self.block)[:, :, None] - (key // self.block)[:, None]
            near = near & (back < self.n_blocks)
        return near | (key < self.n_global)[:, None] if self.n_global else near

    def plan(self, t: int, n_before: int = 0, apart: bool = False) -> Plan | None:
        """How to cut up t queries after n_before slots; None: not at all, it would not pay.

        Args:
            t: queries.
            n_before: slots of a ring before them.
            apart: documents or padding set rows apart, so that positions do not begin with a call.
        """
        whole = not self.causal or (not n_before and self.covers(t))
        if whole or (apart and self.n_global) or (self.span is None and n_before):
            return None
        n_global = self.n_global * (2 if n_before else 1)
        r, m = self.dilation, 1
        if self.block is not None:
            m = self.n_blocks - (not n_before and not apart)
            c = self.block
        elif self.window is None:
            c, m = -(-t // r), 0
        else:
            m = 2 if self.window > LARGE else 1
            c = max(SMALL, -(-(self.window - 1) // m))
        plan = Plan(-(-t // (c * r)), c, r, m, n_global)
        pays = plan.n_queries * plan.n_keys < t * (n_before + t)
        return plan if pays else None


class Cut(NamedTuple):
    """Where the blocks of a plan are, and what they see.

    query, key  of every block, (b n r, c) and (b n r, n_keys); b is 1 for rows that are alike.
    seen        (b n r, 1, c, n_keys) bool.
    """

    query: Places
    key: Places
    seen: Tensor


def cut_up(query: Places, key: Places, stencil: Stencil, plan: Plan) -> Cut:
    """Cut the places of queries and keys; arguments as for `stencil_attention`."""
    t = query.position.shape[1]
    first = pinned(key.position.shape[1] - t, stencil)
    asked, known = (torch.cat(places)[:, None, :, None] for places in (query, key))
    asked = _query_blocks(F.pad(asked, (0, 0, 0, plan.n_queries - t), value=AFTER), plan)
    query = _unstack(asked)
    before, after = _margins(plan, t, known.shape[2] - first)
    blocks = F.pad(known[:, :, first:], (0, 0, before, 0), value=BEFORE)
    blocks = _key_blocks(F.pad(blocks, (0, 0, 0, after), value=AFTER), plan)
    near = _unstack(blocks)
    seen = stencil._replace(n_global=0).visible(query, near)
    if not plan.n_global:
        return Cut(query, near, seen)
    # Among the keys of a block count the later positions, beside them the first ones.
    extra = _early_keys(known, plan, t, first)
    early = _unstack(extra)
    shown = visibility(*query, *early) & (early.position < stencil.n_global)[:, None, None]
    seen = seen & (near.position >= stencil.n_global)[:, None, None]
    both = _unstack(torch.cat([blocks, extra], 2))
    return Cut(query, both, torch.cat([seen, shown], -1))


def _unstack(x: Tensor) -> Places:
    """(2 rows, 1, n, 1) documents, then positions."""
    return Places(*x.flatten(1).chunk(2))


def pinned(n_before: int, stencil: Stencil) -> int:
    """How many of the slots before a call's tokens are those of the first positions."""
    return stencil.n_global if n_before else 0


def stencil_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query: Places,
    key: Places,
    stencil: Stencil,
    plan: Plan,
    *,
    bias: Bias | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    cut: Callable[[], Cut] | None = None,
    own: tuple[Tensor, Tensor, int] | None = None,
) -> Tensor:
    """Attend to what a stencil shows, with all scores written out; see `attention_ref`.

    Args:
        q: (b, h, t, d).
        k, v: (b, h_kv, s, any width); s - t slots of a ring, then the t tokens. The ring's slots
            are the first n_global positions and then the others in the order of their positions,
            dead ones first.
        query, key: where they are; of the keys, document -1 is a dead slot.
        stencil: what is seen.
        plan: of the stencil for these tokens. This loop needs none.
        bias: makes (b or 1, h, t, s) of (b or 1, t, s) position of query minus that of key.
        softcap, scale, sinks: as for `attention_ref`.
        cut: `cut_up` of the same, if it is at hand.
        own: keys and values, in place of k and v for queries of their own group, and how many
            positions make one.

    Returns:
        (b, h, t, width of v).
    """
    how = {"softcap": softcap, "scale": scale, "sinks": sinks, "causal": stencil.causal}
    added = None if bias is None else bias(distance(query, key))
    seen = stencil.visible(query, key)
    if own is not None:
        k, v = torch.cat([k, own[0]], 2), torch.cat([v, own[1]], 2)
        seen, added = _beside(query, key, seen, added, own[2])
    return attention_ref(q, k, v, visible=seen, bias=added, **how)


def stencil_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query: Places,
    key: Places,
    stencil: Stencil,
    plan: Plan,
    *,
    bias: Bias | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    cut: Callable[[], Cut] | None = None,
    own: tuple[Tensor, Tensor, int] | None = None,
) -> Tensor:
    """`stencil_attention_ref` block by block, each with the keys that its queries may see."""
    b, h, t, _ = q.shape
    first = pinned(k.shape[2] - t, stencil)
    blocks = cut_up(query, key, stencil, plan) if cut is None else cut()
    queries = _query_blocks(F.pad(q, (0, 0, 0, plan.n_queries - t)), plan)
    added = None if bias is None else bias(distance(blocks.query, blocks.key))
    seen = _rows(blocks.seen, len(queries))
    added = None if added is None else _rows(added, len(queries))
    keys, values = (_keys(x, plan, t, first) for x in (k, v))
    if own is not None:
        own_k, own_v = (_keys(x, plan, t, first) for x in own[:2])
        keys, values = torch.cat([keys, own_k], 2), torch.cat([values, own_v], 2)
        seen, added = _beside(blocks.query, blocks.key, seen, added, own[2])
    how = {"softcap": softcap, "scale": scale, "sinks": sinks}
    y = attention(queries, keys, values, visible=seen, bias=added, **how)
    y = y.view(b, plan.n, plan.r, h, plan.c, -1).permute(0, 3, 1, 4, 2, 5)
    return y.reshape(b, h, plan.n_queries, -1)[:, :, :t]


def _beside(
    query: Places, key: Places, seen: Tensor, added: Tensor | None, n: int
) -> tuple[Tensor, Tensor | None]:
    """What is seen, and added to the scores, of keys of two kinds side by side, the second for
    queries of the same n positions."""
    same = (query.position[:, :, None] // n == key.position[:, None] // n)[:, None]
    same = _rows(same, len(seen))
    added = None if added is None else torch.cat([added, added], -1)
    return torch.cat([seen & ~same, seen & same], -1), added


def distance(query: Places, key: Places) -> Tensor:
    """(b or 1, t, s) position of query minus that of key."""
    return query.position[:, :, None] - key.position[:, None]


def _rows(x: Tensor, rows: int) -> Tensor:
    """What is alike for all rows of a batch once for each."""
    return x if len(x) == rows else x.repeat(rows // len(x), 1, 1, 1)


def _query_blocks(x: Tensor, plan: Plan) -> Tensor:
    """(b, h, n c r, w) to (b n r, h, c, w)."""
    b, h, _, w = x.shape
    x = x.reshape(b, h, plan.n, plan.c, plan.r, w).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b * plan.n * plan.r, h, plan.c, w)


def _key_blocks(x: Tensor, plan: Plan) -> Tensor:
    """(b, h, (m + n) c r, w) to (b n r, h, (m + 1) c, w): every block after the m before it."""
    x = x.unflatten(2, (plan.m + plan.n, plan.c * plan.r))
    blocks = torch.cat([x[:, :, i : i + plan.n] for i in range(plan.m + 1)], 3)
    b, h, n, _, w = blocks.shape
    blocks = blocks.reshape(b, h, n, (plan.m + 1) * plan.c, plan.r, w).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(b * n * plan.r, h, -1, w)


def _keys(x: Tensor, plan: Plan, t: int, first: int) -> Tensor:
    """(b n r, h, n_keys, w) of keys or values (b, h, s, w), the first `first` of them pinned."""
    local = x[:, :, first:]
    before, after = _margins(plan, t, local.shape[2])
    blocks = _key_blocks(F.pad(local, (0, 0, before, after)), plan)
    return torch.cat([blocks, _early_keys(x, plan, t, first)], 2) if plan.n_global else blocks


def _early_keys(x: Tensor, plan: Plan, t: int, first: int) -> Tensor:
    """The pinned slots, and the first tokens of the call, which may be first positions too."""
    begin = x.shape[2] - t
    new = x[:, :, begin : begin + plan.n_global - first]
    new = torch.cat([x[:, :, :first], new], 2) if first else new
    return new.repeat_interleave(plan.n * plan.r, 0)


def _margins(plan: Plan, t: int, n_local: int) -> tuple[int, int]:
    """How many keys to add before and after those of which the last t are queries' own."""
    return plan.m * plan.c * plan.r - (n_local - t), plan.n_queries - t


STENCIL_ATTENTION = Engines(
    "stencil_attention", reference=stencil_attention_ref, torch=stencil_attention
)
