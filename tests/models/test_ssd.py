"""State space duality: the chunked forms against the loops, at odd lengths and extreme decays."""

import pytest
import torch
from tolerance import assert_close
from torch.utils.flop_counter import FlopCounterMode

from kizzasi.errors import ShapeError
from kizzasi.models.ops.ssd import (
    TrapezoidState,
    ssd,
    ssd_flops,
    ssd_ref,
    ssd_step,
    trapezoid,
    trapezoid_ref,
    trapezoid_step,
)

LENGTHS = (1, 2, 7, 63, 64, 65, 100)
BOTH = pytest.mark.parametrize("rule", ["ssd", "trapezoid"])


def draw(g, *shape):
    return torch.randn(shape, generator=g, dtype=torch.float64)


def inputs(rule, t, *, b=2, h=4, g=2, p=3, n=5, decay=(-2.0, -1e-3), dtype=torch.float64):
    """Per-token tensors, then those of the state."""
    r = torch.Generator().manual_seed(t)
    g = h if rule == "trapezoid" else g
    x, B, C, state = (
        draw(r, b, t, h, p),
        draw(r, b, t, g, n),
        draw(r, b, t, g, n),
        draw(r, b, h, p, n),
    )
    unit = torch.rand(3, b, t, h, generator=r, dtype=torch.float64)
    log_decay = unit[0] * (decay[1] - decay[0]) + decay[0]
    made = [x, log_decay, B, C, state]
    if rule == "trapezoid":
        made = [x, unit[1], log_decay, unit[2], B, C, state, draw(r, b, h, n), draw(r, b, h, p)]
    return [v.to(dtype).requires_grad_() for v in made]


def run(rule, tensors, starts=None, *, reference=False):
    """y and the leaves of the final state."""
    if rule == "ssd":
        return (ssd_ref if reference else ssd)(*tensors, starts)
    form = trapezoid_ref if reference else trapezoid
    y, state = form(*tensors[:6], TrapezoidState(*tensors[6:]), starts)
    return (y, *state)


def values_and_gradients(*args, **kwargs):
    tensors, out = args[1], run(*args, **kwargs)
    g = torch.Generator().manual_seed(9)
    weights = [draw(g, *v.shape).to(v.dtype) for v in out]
    return [*out, *torch.autograd.grad(out, tensors, weights)]


def document_starts(t, b=2, share=0.1):
    return torch.rand(b, t, generator=torch.Generator().manual_seed(3)) < share


def compare(rule, tensors, starts=None):
    expected = values_and_gradients(rule, tensors, starts, reference=True)
    for i, v in enumerate(values_and_gradients(rule, tensors, starts)):
        assert_close(v, expected[i], msg=f"tensor {i}")


@BOTH
@pytest.mark.parametrize("share", [None, 0.05, 0.5])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_is_the_loop(rule, length, share):
    starts = None if share is None else document_starts(length, share=share)
    compare(rule, inputs(rule, length), starts)


@pytest.mark.parametrize("groups", [1, 4])
def test_groups_share_their_keys(groups):
    compare("ssd", inputs("ssd", 70, g=groups), document_starts(70))


@BOTH
@pytest.mark.parametrize(
    "decay", [(-1e4, -1e4), (-50.0, -40.0), (-1e-9, 0.0), (0.0, 0.0), (-300.0, 0.0)]
)
def test_both_ends_of_the_decay(rule, decay):
    compare(rule, inputs(rule, 100, decay=decay))
    compare(rule, inputs(rule, 100, decay=decay), document_starts(100))
    exact = values_and_gradients(rule, inputs(rule, 100, decay=decay), reference=True)
    single = values_and_gradients(rule, inputs(rule, 100, decay=decay, dtype=torch.float32))
    for a, e in zip(single, exact, strict=True):
        scale = e.abs().max().clamp(min=1e-6)
        assert_close(a / scale.float(), (e / scale).float())


def test_one_strong_decay_costs_the_tokens_after_it_no_digits():
    x, log_decay, B, C, state = (v.detach() for v in inputs("ssd", 64, decay=(-1e-3, -1e-3)))
    log_decay[:, 3] = -3e4
    exact, _ = ssd_ref(x, log_decay, B, C, state)
    single, _ = ssd(*(v.float() for v in (x, log_decay, B, C, state)))
    assert (single - exact).abs().max() < 1e-6 * exact.abs().max()


@BOTH
@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("cut", [1, 40, 64])
def test_any_split_is_one_call(rule, reference, cut):
    tensors, starts = inputs(rule, 65), document_starts(65)
    n_streams = 4 if rule == "ssd" else 6
    streams, state = tensors[:n_streams], tensors[n_streams:]
    whole, *final = run(rule, tensors, starts, reference=reference)
    head = [v[:, :cut] for v in streams]
    y0, *between = run(rule, [*head, *state], starts[:, :cut], reference=reference)
    tail = [v[:, cut:] for v in streams]
    y1, *end = run(rule, [*tail, *between], starts[:, cut:], reference=reference)
    assert_close(torch.cat([y0, y1], 1), whole)
    for a, e in zip(end, final, strict=True):
        assert_close(a, e)


@BOTH
@pytest.mark.parametrize("start", [0, 45, 64])
def test_a_document_sees_nothing_before_its_start(rule, start):
    tensors = inputs(rule, 70)
    n_streams = 4 if rule == "ssd" else 6
    streams, state = tensors[:n_streams], tensors[n_streams:]
    starts = torch.zeros(2, 70, dtype=torch.bool)
    starts[:, start] = True
    y, *end = run(rule, tensors, starts)
    fresh = [torch.zeros_like(v) for v in state]
    alone, *alone_end = run(rule, [*(v[:, start:] for v in streams), *fresh])
    assert_close(y[:, start:], alone)
    for a, e in zip(end, alone_end, strict=True):
        assert_close(a, e)
    loss = y[:, start:].sum() + sum(v.sum() for v in end)
    for leak in torch.autograd.grad(loss, state):
        assert not leak.any()
    for leak in torch.autograd.grad(run(rule, tensors, starts)[0][:, start:].sum(), streams):
        assert_close(leak[:, :start], torch.zeros_like(leak[:, :start]))


def test_steps_are_the_loop():
    x, dt, log_decay, share, B, C, *state = inputs("trapezoid", 5)
    h, carried, ys = state[0], TrapezoidState(*state), []
    plain, _ = ssd_ref(x, log_decay, B, C, h)
    y_ref, end = trapezoid_ref(x, dt, log_decay, share, B, C, carried)
    for t in range(5):
        y, h = ssd_step(h, x[:, t], log_decay[:, t], B[:, t], C[:, t])
        assert_close(y, plain[:, t])
        token = (v[:, t] for v in (x, dt, log_decay, share, B, C))
        y, carried = trapezoid_step(carried, *token)
        ys.append(y)
    assert_close(torch.stack(ys, 1), y_ref)
    assert_close(carried.h, end.h)


def test_a_share_of_one_is_eulers_rule():
    x, dt, log_decay, share, B, C, *state = inputs("trapezoid", 70)
    y, end = trapezoid(x, dt, log_decay, torch.ones_like(share), B, C, TrapezoidState(*state))
    euler, h = ssd(dt.unsqueeze(-1) * x, log_decay, B, C, state[0])
    assert_close(y, euler)
    assert_close(end.h, h)


@BOTH
def test_second_derivatives(rule):
    tensors = inputs(rule, 5, b=1, h=2, g=1, p=2, n=2)
    found = []
    for reference in (True, False):
        loss = run(rule, tensors, reference=reference)[0].square().sum()
        gradients = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
        loss = sum(v.square().sum() for v in gradients if v is not None)
        found.append(torch.autograd.grad(loss, tensors))
    for a, e in zip(*found, strict=True):
        assert_close(a, e)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 7), (3, 64), (1, 100)])
def test_flops_are_counted(batch, length):
    tensors = inputs("ssd", length, b=batch)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ssd(*tensors)
    assert ssd_flops(batch, length, 4, 2, 3, 5) == counter.get_total_flops()


@pytest.mark.parametrize("form", [ssd, ssd_ref])
def test_disagreeing_shapes_are_refused(form):
    x, log_decay, B, C, state = inputs("ssd", 5)
    with pytest.raises(ShapeError, match="g a divisor of h"):
        form(x[:, :, :3], log_decay[:, :, :3], B, C)
    with pytest.raises(ShapeError, match=r"C is \(2, 4, 2, 5\); expected \(b, t, g, n\) .*t = 5"):
        form(x, log_decay, B, C[:, 1:])
    with pytest.raises(ShapeError, match="state is"):
        form(x, log_decay, B, C, state[:1])


@pytest.mark.cuda
@BOTH
def test_cuda_is_the_cpu(rule):
    tensors, starts = inputs(rule, 100), document_starts(100)
    expected = values_and_gradients(rule, tensors, starts)
    moved = [v.detach().cuda().requires_grad_() for v in tensors]
    for v in run(rule, moved, starts.cuda()):
        assert_close(v.cpu(), expected.pop(0))


def test_a_decay_of_zero_is_a_decay():
    """log_decay = -inf empties the memory, and costs the tokens after it nothing."""
    x, _, B, C, state = (v.detach() for v in inputs("ssd", 70))
    log_decay = torch.full(x.shape[:3], -1e-3, dtype=x.dtype)
    log_decay[:, 31] = -torch.inf
    y, h = ssd(x, log_decay, B, C, state)
    expected, last = ssd_ref(x, log_decay, B, C, state)
    assert_close(y, expected)
    assert_close(h, last)
