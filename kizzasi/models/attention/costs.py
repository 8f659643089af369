"""What a layer of attention costs, from its fields."""

from __future__ import annotations

from typing import Protocol

from kizzasi.models.attention.fields import HeadFields, SourceFields
from kizzasi.models.attention.memory import Remembers
from kizzasi.models.cost import Cost, dense, linear, norm
from kizzasi.models.ops.kv_codes import turned_together
from kizzasi.models.ops.stencil import Stencil

BIASED = ("alibi", "relative")  # positions that add to scores


class CostFields(HeadFields, SourceFields, Protocol):
    """The fields that a cost depends on."""

    @property
    def qkv_shared(self) -> bool: ...
    @property
    def qkv_bias(self) -> bool: ...
    @property
    def out_bias(self) -> bool: ...
    @property
    def gate(self) -> bool: ...
    @property
    def sinks(self) -> bool: ...
    @property
    def softcap(self) -> float | None: ...
    @property
    def coded(self) -> bool: ...
    @property
    def stencil(self) -> Stencil: ...
    def width(self, d_model: int) -> int: ...
    def memory(self, head_dim: int) -> Remembers: ...


def attention_cost(spec: CostFields, d_model: int, seq_len: int, batch: int) -> Cost:
    """Of a layer of attention with these fields."""
    d, n = d_model, batch * seq_len
    head_dim = spec.width(d)
    d_q, d_kv = spec.n_heads * head_dim, spec.kv_heads * head_dim
    slots = spec.stencil.slots
    places = 0 if slots is None else slots  # int64; see AttentionState
    kept = spec.memory(head_dim).state_bytes(seq_len)
    reads = spec.kv_from is not None
    cache = batch * (kept + places * 8) if spec.causal and not reads else 0
    flops = _score_flops(spec, seq_len, batch, head_dim)
    if spec.coded:  # values and the result are turned, and else queries and keys
        turns = 2 if spec.kv_group is None else 1
        flops += 2 * n * turns * (d_q + d_kv) * turned_together(head_dim)
    total = dense(0, flops=flops, state_bytes=cache)
    n_in = d if spec.qkv_rank is None else spec.qkv_rank
    if spec.qkv_rank is not None:
        n_down = 1 if spec.qkv_shared else 3
        total += linear(n, d, n_in * n_down)
    if spec.value_glu:
        total += linear(n, d, d_kv, bias=spec.qkv_bias)
    total += linear(n, n_in, d_q * (1 + spec.gate), bias=spec.qkv_bias)
    for _ in range(0 if reads else 2):
        total += linear(n, n_in, d_kv, bias=spec.qkv_bias)
    total += linear(n, d_q, d, bias=spec.out_bias)
    if spec.memory_from is not None:
        total += norm("rms", d)
    normed = (spec.n_heads,) if reads else (spec.n_heads, spec.kv_heads)
    for heads in normed if spec.qk_norm else ():
        total += norm(spec.qk_norm_kind, head_dim * (1 if spec.qk_norm is True else heads))
    table = spec.n_heads * spec.n_buckets if spec.position == "relative" else 0
    return total + dense(table + spec.n_heads * spec.sinks)


def _score_flops(spec: CostFields, seq_len: int, batch: int, head_dim: int) -> int:
    """Of both products with the scores, masked ones too."""
    queries, keys = seq_len, seq_len
    plan = spec.stencil.plan(seq_len)
    if plan is not None:
        queries, keys = plan.n_queries, plan.n_keys
    if spec.kv_group is not None:  # as they are, and in codes
        keys *= 2
    if spec.sinks and spec.softcap is None:  # see `ops.attention`: one more key, one more entry
        bare = spec.causal and spec.stencil.covers(seq_len) and spec.position not in BIASED
        queries += bare and seq_len > 1
        keys, head_dim = keys + 1, head_dim + 1
    return 2 * (2 * batch * spec.n_heads * queries * keys * head_dim)
