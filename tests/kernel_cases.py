"""Every op that has kernels, with inputs that fill vectors and leave rests."""

import pytest
import torch
from op_cases import normal

from kizzasi.models.ops.conv import CAUSAL_CONV1D
from kizzasi.models.ops.decay_scan import DECAY_SCAN
from kizzasi.models.ops.delta import DELTA_RULE, DELTA_RULE_2
from kizzasi.models.ops.dplr import S4_SCAN, s4_system
from kizzasi.models.ops.linear_attention import LINEAR_ATTENTION
from kizzasi.models.ops.mimo import MIMO_TRAPEZOID
from kizzasi.models.ops.norm import RMS_NORM
from kizzasi.models.ops.s4 import S4D_SCAN
from kizzasi.models.ops.selective_scan import SELECTIVE_SCAN
from kizzasi.models.ops.slstm import SLSTM_SCAN, SLSTMMemory
from kizzasi.models.ops.sorted_experts import MIX_SORTED
from kizzasi.models.ops.ssd import SSD, TRAPEZOID, TrapezoidState
from kizzasi.models.ops.wkv7 import WKV7

CPU = torch.device("cpu")
LENGTHS = (1, 2, 7, 63, 64, 65, 100)
B = 3


def scan(t, gated=True):
    """19 channels: full vectors and a rest; 21 states: a group of 16, one of 4 and padding."""
    d, n = 19, 21
    rates = -torch.arange(1, n + 1) * normal(d, n).exp()
    streams = normal(B, t, d), normal(B, t, d, seed=1) - 2, rates, normal(B, t, n, seed=2)
    given = (*streams, normal(B, t, n, seed=3), normal(d), normal(B, d, n))
    named = {"gate": normal(B, t, d, seed=4)} if gated else {}
    return given, named, {"softplus": True}


def conv(t, k, silu):
    return (normal(B, t, 19), normal(19, k), normal(19), normal(B, 19, k - 1)), {}, {"silu": silu}


def decays(*shape):
    return -0.02 - normal(*shape, seed=9).square()


def memories(t, n, m, w, bonus=False):
    """h = 3 heads, keys of n and values of m channels; w: the decays' shape, 0 for all."""
    h = 3
    streams = normal(B, t, h, n), normal(B, t, h, n, seed=1), normal(B, t, h, m, seed=2)
    shape = [y or x for x, y in zip((B, t, h, n), w, strict=True)]
    given = (*streams, decays(*shape)) + ((normal(h, n),) if bonus else ())
    return given, {"s0": normal(B, h, n, m)}, {}


def dual(t):
    h, p, g, n = 4, 5, 2, 21
    B_, C = normal(B, t, g, n, seed=1), normal(B, t, g, n, seed=2)
    return (normal(B, t, h, p), decays(B, t, h), B_, C, normal(B, h, p, n)), {}, {}


def trapezoid(t):
    h, p, n = 2, 5, 19
    dt, share = normal(B, t, h, seed=1).exp(), normal(B, t, h, seed=2).sigmoid()
    keys = normal(B, t, h, n, seed=3), normal(B, t, h, n, seed=4)
    state = normal(B, h, p, n), normal(B, h, n), normal(B, h, p)
    return (normal(B, t, h, p), dt, decays(B, t, h), share, *keys, *state), {}, {}


def mimo(t):
    h, r, p, n = 2, 3, 5, 19
    dt, share = (normal(B, t, h, seed=i).sigmoid() for i in (1, 2))
    keys = normal(B, t, h, r, n, seed=3), normal(B, t, h, r, n, seed=4)
    state = normal(B, h, p, n), normal(B, h, r, n), normal(B, h, r, p)
    return (normal(B, t, h, r, p), dt, decays(B, t, h), share, *keys, *state), {}, {}


class Ends:
    """A trapezoid's table, for functions of tensors only."""

    def __init__(self, table):
        self.table, self.names = table, table.names

    def pick(self, engine, device):
        op = self.table.pick(engine, device)
        return lambda *x, starts: op(*x[:6], TrapezoidState(*x[6:]), starts)


def delta(t, n, m, width):
    (q, k, v), h = memories(t, n, m, (0, 0, 0, 0))[0][:3], 3
    k = torch.nn.functional.normalize(k, dim=-1)
    beta, g = normal(B, t, h).sigmoid(), decays(B, t, h, n)[..., :width]
    return (q, k, v, g, beta, normal(B, h, n, m)), {}, {}


def delta_2(t):
    (q, k, v, g, _, s0), *_ = delta(t, 7, 5, 7)
    erase, write = normal(*k.shape, seed=5).sigmoid(), normal(*v.shape, seed=6).sigmoid()
    return (q, k, v, g, erase, write, s0), {}, {}


def wkv7(t):
    h, n = 2, 19
    r, k, v, removal, rate = (normal(B, t, h, n, seed=i) for i in range(5))
    removal = torch.nn.functional.normalize(removal, dim=-1)
    given = (r, decays(B, t, h, n), k, v, -removal, removal * rate.sigmoid(), normal(B, h, n, n))
    return given, {}, {}


class Norms:
    """The norm's table, with an epsilon; its state is nothing."""

    names = RMS_NORM.names

    def pick(self, engine, device):
        op, eps = RMS_NORM.pick(engine, device), torch.tensor(0.1, dtype=torch.float64)
        return lambda x, w, starts: (op(x, w, 0.1, eps), ())


class Cells:
    """sLSTM's table, for functions of tensors only; its state apart from the last y."""

    names = SLSTM_SCAN.names

    def pick(self, engine, device):
        op = SLSTM_SCAN.pick(engine, device)
        return lambda x, R, *cells, starts: op(x, R, SLSTMMemory(*cells), starts)


def cells(t, rows=B):
    """Heads of 19 cells, the first of which is empty."""
    h, n = 2, 19
    y, c, m = (normal(rows, h, n, seed=i) for i in range(3))
    norm = normal(rows, h, n).exp()
    norm[:, 0, 0] = c[:, 0, 0] = 0
    return (normal(rows, t, 4, h, n), normal(4, h, n, n) / 4, y, c, norm, m), {}, {}


class Oscillators:
    """A table of complex numbers, which come and go as pairs of reals."""

    def __init__(self, table, enter):
        self.table, self.names, self.enter = table, table.names, enter

    def pick(self, engine, device):
        op = self.table.pick(engine, device)

        def run(u, *given, starts):
            *system, h0 = given
            y, h = op(u, *self.enter(*system), paired(h0), starts)
            return y, torch.stack([h.real, h.imag], -1)

        return run


def paired(x):
    return torch.complex(x[..., 0], x[..., 1])


def diagonal(log_size, angle, B_, C):
    return torch.polar((-log_size.exp()).exp(), angle), paired(B_), paired(C)


def low_rank(*parameters):
    return (s4_system(*(x.contiguous() for x in parameters)),)


def oscillators(t, rank):
    d, n = 19, 5
    pairs = [normal(d, n, 2, seed=i) / 4 for i in range(3)]
    rates = normal(d, n), normal(d, n, seed=1)
    system = (normal(d) / 4, *rates, *pairs) if rank else (*rates, *pairs[1:])
    return (normal(B, t, d) / 4, *system, normal(B, d, n, 2) / 4), {}, {}


class Mixtures:
    """The experts' table: jobs for three of four experts, and a last one for nobody."""

    names = MIX_SORTED.names

    def pick(self, engine, device):
        op = MIX_SORTED.pick(engine, device)

        def run(x, weight, gate_up, down, starts):
            expert = torch.arange(len(weight), device=device) * 7 % 5 % 4 + 1  # the first is idle
            expert[-1] = 4
            counts, order = expert.bincount(minlength=5)[:4], expert.argsort(stable=True)
            token = (torch.arange(len(weight), device=device) // 2)[order]
            return op(x, weight[order], token, counts, gate_up, down), ()

        return run


def mixture(t):
    d, h, e = 19, 21, 4
    given = normal(t, d), normal(2 * t), normal(e, 2 * h, d) / 4, normal(e, d, h, seed=1) / 4
    return given, {}, {}


# name: table, makes (inputs, inputs by name, options) for t tokens
KERNELS = {
    "scan": (SELECTIVE_SCAN, scan),
    "conv": (CAUSAL_CONV1D, lambda t: conv(t, 4, True)),
    "conv-5": (CAUSAL_CONV1D, lambda t: conv(t, 5, False)),
    "linear": (LINEAR_ATTENTION, lambda t: memories(t, 19, 5, (0, 0, 0, 0))),
    "linear-head-bonus": (LINEAR_ATTENTION, lambda t: memories(t, 8, 6, (0, 0, 0, 1), True)),
    "linear-fixed": (LINEAR_ATTENTION, lambda t: memories(t, 5, 4, (1, 1, 0, 0))),
    "linear-fixed-head": (LINEAR_ATTENTION, lambda t: memories(t, 5, 4, (1, 1, 0, 1))),
    "ssd": (SSD, dual),
    "trapezoid": (Ends(TRAPEZOID), trapezoid),
    "mimo": (Ends(MIMO_TRAPEZOID), mimo),
    "delta": (DELTA_RULE, lambda t: delta(t, 19, 6, 1)),
    "delta-channel": (DELTA_RULE, lambda t: delta(t, 5, 9, 5)),
    "delta-2": (DELTA_RULE_2, delta_2),
    "wkv7": (WKV7, wkv7),
    "slstm": (Cells(), cells),
    "s4d": (Oscillators(S4D_SCAN, diagonal), lambda t: oscillators(t, False)),
    "s4": (Oscillators(S4_SCAN, low_rank), lambda t: oscillators(t, True)),
    "norm": (Norms(), lambda t: ((normal(B, t, 19), normal(19)), {}, {})),
    "experts": (Mixtures(), mixture),
    "decay": (DECAY_SCAN, lambda t: ((decays(B, t, 19), normal(B, t, 19), normal(B, 19)), {}, {})),
}
every_kernel = pytest.mark.parametrize("name", KERNELS)


def document_starts(t):
    return torch.rand(B, t, generator=torch.Generator().manual_seed(t)) < 0.2


def made(name, t, dtype=torch.float64, device=CPU):
    """Leaves, and a function of an engine's name and of them to all outputs, as one vector."""
    table, make = KERNELS[name]
    given, named, options = make(t)
    leaves = [x.to(device, dtype).requires_grad_() for x in (*given, *named.values())]

    def run(engine, leaves, starts=None):
        by_name = dict(zip(named, leaves[len(given) :], strict=True))
        op = table.pick(engine, device)
        y, state = op(*leaves[: len(given)], starts=starts, **by_name, **options)
        after = (state,) if isinstance(state, torch.Tensor) else state
        return torch.cat([x.flatten() for x in (y, *after)])

    return leaves, run


def results(run, engine, leaves, starts=None):
    out = run(engine, leaves, starts)
    weights = torch.linspace(-1, 1, len(out), dtype=out.dtype)
    return out, *torch.autograd.grad((out * weights).sum(), leaves)
