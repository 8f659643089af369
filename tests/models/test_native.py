"""The compiled kernels against the defining loops: every instruction set, dtype, length, thread
count, and the occasions on which torch's form answers in their place."""

import pytest
import torch
from op_cases import normal
from tolerance import assert_close
from torch.utils.flop_counter import FlopCounterMode

from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.mixers import MambaSpec
from kizzasi.models.ops.conv import CAUSAL_CONV1D
from kizzasi.models.ops.decay_scan import DECAY_SCAN
from kizzasi.models.ops.delta import DELTA_RULE
from kizzasi.models.ops.linear_attention import LINEAR_ATTENTION
from kizzasi.models.ops.norm import RMS_NORM
from kizzasi.models.ops.selective_scan import SELECTIVE_SCAN
from kizzasi.models.ops.ssd import SSD, TRAPEZOID, TrapezoidState
from kizzasi.models.ops.wkv7 import WKV7

library = pytest.importorskip(
    "kizzasi.models.ops.native.library",
    reason="no compiled kernels here: python -m kizzasi.models.ops.native.build",
    exc_type=ImportError,
)
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
    """h = 3 heads, keys of n and values of m channels."""
    h = 3
    streams = normal(B, t, h, n), normal(B, t, h, n, seed=1), normal(B, t, h, m, seed=2)
    shape = [y if y in (1, 3) else x for x, y in zip((B, t, h, n), w, strict=True)]
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


class Ends:
    """The trapezoid's table, for functions of tensors only."""

    def pick(self, engine, device):
        op = TRAPEZOID.pick(engine, device)
        return lambda *x, starts: op(*x[:6], TrapezoidState(*x[6:]), starts)


def delta(t, n, m, width):
    (q, k, v), h = memories(t, n, m, (3, 3, 3, 3))[0][:3], 3
    k = torch.nn.functional.normalize(k, dim=-1)
    beta, g = normal(B, t, h).sigmoid(), decays(B, t, h, n)[..., :width]
    return (q, k, v, g, beta, normal(B, h, n, m)), {}, {}


def wkv7(t):
    h, n = 2, 19
    r, k, v, removal, rate = (normal(B, t, h, n, seed=i) for i in range(5))
    removal = torch.nn.functional.normalize(removal, dim=-1)
    given = (r, decays(B, t, h, n), k, v, -removal, removal * rate.sigmoid(), normal(B, h, n, n))
    return given, {}, {}


class Norms:
    """The norm's table, with an epsilon; its state is nothing."""

    def pick(self, engine, device):
        op, eps = RMS_NORM.pick(engine, device), torch.tensor(0.1, dtype=torch.float64)
        return lambda x, w, starts: (op(x, w, 0.1, eps), ())


# name: table, makes (inputs, inputs by name, options) for t tokens
KERNELS = {
    "scan": (SELECTIVE_SCAN, scan),
    "conv": (CAUSAL_CONV1D, lambda t: conv(t, 4, True)),
    "conv-5": (CAUSAL_CONV1D, lambda t: conv(t, 5, False)),
    "linear": (LINEAR_ATTENTION, lambda t: memories(t, 19, 5, (3, 0, 3, 0))),
    "linear-head-bonus": (LINEAR_ATTENTION, lambda t: memories(t, 8, 6, (3, 0, 3, 1), True)),
    "linear-fixed": (LINEAR_ATTENTION, lambda t: memories(t, 5, 4, (1, 1, 3, 0))),
    "linear-fixed-head": (LINEAR_ATTENTION, lambda t: memories(t, 5, 4, (1, 1, 3, 1))),
    "ssd": (SSD, dual),
    "trapezoid": (Ends(), trapezoid),
    "delta": (DELTA_RULE, lambda t: delta(t, 19, 6, 1)),
    "delta-channel": (DELTA_RULE, lambda t: delta(t, 5, 9, 5)),
    "wkv7": (WKV7, wkv7),
    "norm": (Norms(), lambda t: ((normal(B, t, 19), normal(19)), {}, {})),
    "decay": (DECAY_SCAN, lambda t: ((decays(B, t, 19), normal(B, t, 19), normal(B, 19)), {}, {})),
}
every_kernel = pytest.mark.parametrize("name", KERNELS)


def document_starts(t):
    return torch.rand(B, t, generator=torch.Generator().manual_seed(t)) < 0.2


def made(name, t, dtype=torch.float64):
    """Leaves, and a function of an engine's name and of them to all outputs, as one vector."""
    table, make = KERNELS[name]
    given, named, options = make(t)
    leaves = [x.to(dtype).requires_grad_() for x in (*given, *named.values())]

    def run(engine, leaves, starts=None):
        by_name = dict(zip(named, leaves[len(given) :], strict=True))
        op = table.pick(engine, CPU)
        y, state = op(*leaves[: len(given)], starts=starts, **by_name, **options)
        after = (state,) if isinstance(state, torch.Tensor) else state
        return torch.cat([x.flatten() for x in (y, *after)])

    return leaves, run


def results(run, engine, leaves, starts=None):
    out = run(engine, leaves, starts)
    weights = torch.linspace(-1, 1, len(out), dtype=out.dtype)
    return out, *torch.autograd.grad((out * weights).sum(), leaves)


def assert_agrees(name, t, dtype, starts):
    leaves, run = made(name, t, dtype)
    found, expected = (results(run, engine, leaves, starts) for engine in ("native", "reference"))
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert_close(x, y, msg=f"{name}, {t} tokens, {dtype}, result {i}")


@every_kernel
@pytest.mark.parametrize("packed", [False, True])
def test_a_kernel_equals_the_loop_at_every_length(name, packed):
    for t in LENGTHS:
        for dtype in (torch.float64, torch.float32):
            assert_agrees(name, t, dtype, document_starts(t) if packed else None)


@every_kernel
@pytest.mark.parametrize("isa", library.AVAILABLE)
def test_every_instruction_set_of_this_machine_agrees(name, isa):
    assert isa in library.AVAILABLE
    with library.using(isa):
        for dtype in (torch.float64, torch.float32):
            assert_agrees(name, 35, dtype, document_starts(35))


@every_kernel
def test_inputs_may_lie_anywhere(name):
    """Transposed, or cut out of wider rows."""
    leaves, run = made(name, 9)
    expected = results(run, "native", leaves)
    apart = [x.detach().mT.contiguous().mT if x.ndim > 1 else x for x in leaves]
    wider = [torch.cat([x.detach(), x.detach()], -1)[..., : x.shape[-1]] for x in leaves]
    for moved in (apart, wider):
        found = results(run, "native", [x.detach().requires_grad_() for x in moved])
        for x, y in zip(found, expected, strict=True):
            assert_close(x, y)


@every_kernel
def test_threads_change_nothing(name, monkeypatch):
    leaves, run = made(name, 40)
    expected = results(run, "native", leaves)
    monkeypatch.setattr(library, "threads", lambda numbers: 3)
    assert all(map(torch.equal, results(run, "native", leaves), expected))


@every_kernel
def test_what_kernels_cannot_do_torch_does(name):
    """Second derivatives, many gradients at once, torch.func; where work is counted."""
    leaves, run = made(name, 5)
    again = []
    for engine in ("native", "reference"):
        out = run(engine, leaves).square().sum()
        first = torch.autograd.grad(out, leaves, create_graph=True)
        again.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for actual, expected in zip(*again, strict=True):
        assert_close(actual, expected)
    rows = torch.eye(4, len(run("native", leaves)), dtype=torch.float64)
    batched = [
        torch.autograd.grad(run(engine, leaves), leaves, rows, is_grads_batched=True)
        for engine in ("native", "reference")
    ]
    for actual, expected in zip(*batched, strict=True):
        assert_close(actual, expected)
    inside = torch.func.grad(lambda x: run("native", [x, *leaves[1:]]).square().sum())(leaves[0])
    assert_close(inside, torch.autograd.grad(run("native", leaves).square().sum(), leaves[0])[0])
    counts = []
    for engine in ("native", "torch"):
        with FlopCounterMode(display=False) as counter:
            run(engine, leaves)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@every_kernel
def test_without_gradients_nothing_is_kept(name):
    leaves, run = made(name, 40)
    with torch.no_grad():
        out = run("native", leaves)
    assert not out.requires_grad
    assert torch.equal(out, run("native", leaves))


@every_kernel
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_a_number_stays_in_its_document(name, bad):
    leaves, run = made(name, 12)
    starts = torch.arange(12).expand(B, -1) % 6 == 0
    clean = run("native", leaves, starts)
    for i, x in enumerate(leaves):
        if x.shape[:2] != (B, 12):
            continue
        spoilt = [v.detach().clone() for v in leaves]
        spoilt[i][1, 8] = bad
        y = run("native", spoilt, starts)
        share = y.isfinite()
        assert 0 < (~share).sum() < len(y) / B
        assert_close(y[share], clean[share])


def test_auto_is_native_on_a_cpu_and_a_model_says_so():
    assert SELECTIVE_SCAN.resolve("auto", CPU) == "native"
    spec = ModelSpec(16, (BlockSpec(MambaSpec(d_state=4)),), Tokens(7))
    model = build_model(spec)
    assert "engine=native, params=" in repr(model)
    assert build_model(spec, engine="native").blocks[0].mixer.engine == "native"
    assert "engine=torch, params=" in repr(build_model(spec, engine="torch"))


def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="'mmx' is not among"), library.using("mmx"):
        pass
