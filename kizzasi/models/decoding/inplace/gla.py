"""Gated linear attention and retention with their memories written in place.

b rows · h heads · n channels of a key · m of a value
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models.call import Call
from kizzasi.models.decoding.inplace.base import About, Products, Steps, readable, write_norm
from kizzasi.models.mixers.gla import GLA, GLAState
from kizzasi.models.mixers.retention import Retention, RetentionState
from kizzasi.models.norm import WideLinear
from kizzasi.models.ops.linear_attention import linear_attention_step_

if TYPE_CHECKING:
    from kizzasi.models.ops.native.steps import Program


class GLASteps(Steps):
    """`GLA.recurrent`."""

    def __init__(self, mixer: GLA, widen: WideLinear, state: GLAState, products: Products) -> None:
        self.mixer, self.widen = mixer, widen
        self.memory = state.memory.clone(memory_format=torch.contiguous_format)
        narrow = mixer.gk_proj[0]
        layers = mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj, narrow
        self.enter, self.leave = products.of(*layers), products.of(mixer.o_proj)
        h, n, m = mixer.spec.n_heads, mixer.n, mixer.m
        self.parts = h * n, h * n, h * m, h * m, mixer.spec.gate_rank

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        mixer, heads = self.mixer, (self.mixer.spec.n_heads, -1)
        q, k, v, gate, narrow = self.enter(x).split_with_sizes(self.parts, -1)
        decay = F.logsigmoid(self.widen(narrow)) / mixer.spec.gate_normalizer
        q, k, v, decay = (part.unflatten(-1, heads) for part in (q, k, v, decay))
        y = linear_attention_step_(self.memory, q * mixer.n**-0.5, k, v, decay)
        return self.leave(mixer.g_norm(y).flatten(-2).mul_(F.silu(gate)))

    def write(self, program: Program, x: Tensor) -> Tensor:
        mixer, (keys, _, values, *_) = self.mixer, self.parts
        q, k, v, gate, narrow = self.enter.write(program, x, "in").split_with_sizes(self.parts, -1)
        decay, y = program.room("decay", keys), program.room("read", values)
        program.product(narrow, readable(self.widen.weight), readable(self.widen.bias), decay)
        scales = program.number(mixer.n**-0.5, 1.0, 1 / mixer.spec.gate_normalizer)
        rows = q.stride(0), k.stride(0), v.stride(0)
        sizes = mixer.spec.n_heads, mixer.n, mixer.m, *rows
        program.add("linear", [q, k, v, None, decay, None, scales, self.memory, y], *sizes)
        write_norm(mixer.g_norm, program, y, y)
        program.gate("silu", gate, y, y)
        return self.leave.write(program, y, "mixed")

    def value(self) -> GLAState:
        return GLAState(self.memory.clone())


class RetentionSteps(Steps):
    """`Retention.recurrent`: a token's own place is 0, where nothing turns; the memory does."""

    def __init__(self, mixer: Retention, state: RetentionState, products: Products) -> None:
        self.mixer = mixer
        self.memory = state.memory.clone(memory_format=torch.contiguous_format)
        layers = mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj
        self.enter, self.leave = products.of(*layers), products.of(mixer.o_proj)
        h, n, m = mixer.spec.n_heads, mixer.n, mixer.m
        self.parts = h * n, h * n, h * m, h * m
        self.decay = mixer._decay(self.memory)

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        mixer, heads = self.mixer, (self.mixer.spec.n_heads, -1)
        q, k, v, gate = self.enter(x).split_with_sizes(self.parts, -1)
        q, k, v = (part.unflatten(-1, heads) for part in (q, k, v))
        y = linear_attention_step_(self.memory, q, k * mixer.n**-0.5, v, self.decay)
        self.memory.copy_(mixer._turn_back(self.memory, 1))
        return self.leave(mixer.g_norm(y).flatten(-2).mul_(F.silu(gate)))

    def write(self, program: Program, x: Tensor) -> Tensor:
        mixer, norm, half = self.mixer, self.mixer.g_norm, self.mixer.n // 2
        q, k, v, gate = self.enter.write(program, x, "in").split_with_sizes(self.parts, -1)
        y, scales = program.room("read", self.parts[2]), program.number(1.0, mixer.n**-0.5, 0.0)
        turn = mixer._turn_back(torch.eye(mixer.n, dtype=program.dtype)[None, None], 1)[0, 0]
        turns = torch.stack([turn.diagonal()[:half], -turn.diagonal(half)])
        kept = self.decay.exp().flatten()
        tensors = [q, k, v, kept, None, turns, scales, self.memory, y]
        rows = q.stride(0), k.stride(0), v.stride(0)
        program.add("linear", tensors, mixer.spec.n_heads, mixer.n, mixer.m, *rows)
        bias = None if norm.bias is None else readable(norm.bias)
        weight = readable(norm.weight)
        program.norm(y, y, mixer.m, weight, bias, norm.eps, centred=True, each=True)
        program.gate("silu", gate, y, y)
        return self.leave.write(program, y, "mixed")

    def value(self) -> RetentionState:
        return RetentionState(self.memory.clone())


def gla_steps(mixer: GLA, state: GLAState, about: About) -> Steps | None:
    widen = mixer.gk_proj[1]
    if type(widen) is not WideLinear or state.memory.dtype != about.dtype:
        return None
    return GLASteps(mixer, widen, state, about.products)


def retention_steps(mixer: Retention, state: RetentionState, about: About) -> Steps | None:
    fits = state.memory.dtype == about.dtype
    return RetentionSteps(mixer, state, about.products) if fits else None
