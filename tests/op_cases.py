"""Every op that has a fast form and a defining loop, with small inputs in float64."""

import pytest
import torch

from kizzasi.models.ops import (
    conv,
    decay_scan,
    delta,
    linear_attention,
    mimo,
    mlstm,
    selective_scan,
    slstm,
    ssd,
    wkv4,
    wkv7,
)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def short_conv():
    return (normal(2, 9, 3), normal(3, 4), normal(3), normal(2, 3, 3)), {"silu": True}


def selective():
    b, t, d, n = 2, 9, 3, 2
    u, B, C = normal(b, t, d), normal(b, t, n, seed=1), normal(b, t, n, seed=2)
    dt, A = 0.1 + 0.1 * normal(b, t, d, seed=3).sigmoid(), -normal(d, n).exp()
    return (u, dt, A, B, C, normal(d), normal(b, d, n)), {}


def negative(*shape, seed=0):
    return -0.1 - normal(*shape, seed=seed).sigmoid()


def linear(shape, bonus):
    b, t, h, n, m = 2, 9, 2, 3, 2
    q, k, v = normal(b, t, h, n), normal(b, t, h, n, seed=1), normal(b, t, h, m, seed=2)
    made = (q, k, v, negative(*shape, seed=3), normal(h, n) if bonus else None)
    return (*made, normal(b, h, n, m)), {}


def dual():
    b, t, h, p, g, n = 2, 9, 4, 2, 2, 3
    B, C = normal(b, t, g, n, seed=1), normal(b, t, g, n, seed=2)
    return (normal(b, t, h, p), negative(b, t, h), B, C, normal(b, h, p, n)), {}


def trapezoid(run):
    def wrapped(x, dt, log_decay, share, B, C, *state, starts=None):
        state = ssd.TrapezoidState(*state)
        return run(x, dt, log_decay, share, B, C, state, starts)

    return wrapped


def many_ends():
    b, t, h, r, p, n = 2, 9, 2, 3, 3, 2
    dt, share = normal(b, t, h, seed=1).exp(), normal(b, t, h, seed=2).sigmoid()
    B, C = normal(b, t, h, r, n, seed=3), normal(b, t, h, r, n, seed=4)
    state = normal(b, h, p, n), normal(b, h, r, n), normal(b, h, r, p)
    return (normal(b, t, h, r, p), dt, negative(b, t, h), share, B, C, *state), {}


def two_ends():
    b, t, h, p, n = 2, 9, 2, 3, 2
    dt, share = normal(b, t, h, seed=1).exp(), normal(b, t, h, seed=2).sigmoid()
    B, C = normal(b, t, h, n, seed=3), normal(b, t, h, n, seed=4)
    state = normal(b, h, p, n), normal(b, h, n), normal(b, h, p)
    return (normal(b, t, h, p), dt, negative(b, t, h), share, B, C, *state), {}


def corrected(g_width):
    b, t, h, n, m = 2, 9, 2, 3, 2
    q, k, v = normal(b, t, h, n), normal(b, t, h, n, seed=1), normal(b, t, h, m, seed=2)
    k = torch.nn.functional.normalize(k, dim=-1)
    beta, g = normal(b, t, h).sigmoid(), negative(b, t, h, g_width)
    return (q, k, v, g, beta, normal(b, h, n, m)), {}


def erased_and_written():
    (*streams, _, s), options = corrected(3)
    v = streams[2]
    return (*streams, normal(2, 9, 2, 3).sigmoid(), normal(*v.shape, seed=5).sigmoid(), s), options


def average(run):
    def wrapped(w, u, k, v, num, den, starts=None):
        y, state = run(w, u, k, v, wkv4.WKV4State(num, den, torch.zeros_like(num)), starts)
        unit = state.max.exp()  # of num and den: it has no gradient, and moves with the keys
        return y, (state.num * unit, state.den * unit)

    return wrapped


def averaged():
    b, t, d = 2, 9, 3
    k, v = normal(b, t, d), normal(b, t, d, seed=1)
    return (negative(d), normal(d), k, v, normal(b, d), normal(b, d, seed=1).exp()), {}


def rewritten(strength):
    b, t, h, n = 2, 9, 2, 4
    r, k, v, removal, rate = (normal(b, t, h, n, seed=i) for i in range(5))
    removal = torch.nn.functional.normalize(removal, dim=-1)
    w = strength * negative(b, t, h, n)
    return (r, w, k, v, -removal, removal * rate.sigmoid(), normal(b, h, n, n)), {}


def leaking():
    return (negative(2, 9, 3), normal(2, 9, 3), normal(2, 3)), {}


def normalised(run):
    def wrapped(q, k, v, log_i, log_f, C, n, m, starts=None):
        y, memory = run(q, k, v, log_i, log_f, mlstm.MLSTMMemory(C, n, m), starts)
        return y, tuple(memory)

    return wrapped


def gated_matrix():
    b, t, h, n, p = 2, 9, 2, 3, 2
    streams = normal(b, t, h, n), normal(b, t, h, n, seed=1), normal(b, t, h, p, seed=2)
    memory = normal(b, h, n, p), normal(b, h, n), normal(b, h)
    return (*streams, normal(b, t, h), negative(b, t, h), *memory), {}


def cells(x, R, y, c, n, m, starts=None):
    out, memory = slstm.slstm_ref(x, R, slstm.SLSTMMemory(y, c, n, m), starts)
    return out, tuple(memory)


def cell_inputs():
    b, t, h, n = 2, 9, 2, 3
    y, c, m = (normal(b, h, n, seed=i) for i in range(3))
    return (normal(b, t, 4, h, n), 0.5 * normal(4, h, n, n), y, c, normal(b, h, n).exp(), m), {}


# name: fast op, loop, inputs that have gradients, index of the first that is a state
LINEAR = linear_attention.linear_attention, linear_attention.linear_attention_ref
OPS = {
    "conv": (conv.causal_conv1d, conv.causal_conv1d_ref, short_conv, 3),
    "scan": (selective_scan.selective_scan, selective_scan.selective_scan_ref, selective, 6),
    "linear_attention": (*LINEAR, lambda: linear((2, 9, 2, 3), False), 5),
    "linear_attention-head-bonus": (*LINEAR, lambda: linear((2, 9, 2, 1), True), 5),
    "linear_attention-fixed-bonus": (*LINEAR, lambda: linear((1, 1, 2, 3), True), 5),
    "ssd": (ssd.ssd, ssd.ssd_ref, dual, 4),
    "trapezoid": (trapezoid(ssd.trapezoid), trapezoid(ssd.trapezoid_ref), two_ends, 6),
    "mimo": (trapezoid(mimo.mimo_trapezoid), trapezoid(mimo.mimo_trapezoid_ref), many_ends, 6),
    "delta-head": (delta.delta_rule, delta.delta_rule_ref, lambda: corrected(1), 5),
    "delta-channel": (delta.delta_rule, delta.delta_rule_ref, lambda: corrected(3), 5),
    "delta-2": (delta.delta_rule_2, delta.delta_rule_2_ref, erased_and_written, 6),
    "wkv7": (wkv7.wkv7, wkv7.wkv7_ref, lambda: rewritten(1), 6),
    "wkv7-strong": (wkv7.wkv7, wkv7.wkv7_ref, lambda: rewritten(60), 6),
    "decay_scan": (decay_scan.decay_scan, decay_scan.decay_scan_ref, leaking, 2),
    "mlstm": (normalised(mlstm.mlstm), normalised(mlstm.mlstm_ref), gated_matrix, 5),
    "slstm": (cells, cells, cell_inputs, 2),
    "wkv4": (average(wkv4.wkv4), average(wkv4.wkv4_ref), averaged, 4),
}
STARTS = torch.tensor([[0, 0, 1, 0, 0, 0, 1, 1, 0], [1, 0, 0, 0, 1, 0, 0, 0, 0]]).bool()

every_op = pytest.mark.parametrize("name", OPS)
