"""The selective scan and the short convolution: fast form against the defining one."""

import itertools

import pytest
import torch
from tolerance import assert_close

from kizzasi.errors import ShapeError
from kizzasi.models.ops import conv, devices, scan_blocks
from kizzasi.models.ops import selective_scan as scan

LENGTHS = (1, 2, 7, 63, 64, 65, 100)
SCAN_NAMES = ("u", "dt", "A", "B", "C", "D", "h0")
CONV_NAMES = ("x", "weight", "bias", "state")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Uninitialised memory is NaN, so that reading it before writing shows."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    poison = lambda v: v.fill_(float("nan")) if v.is_floating_point() else v  # noqa: E731
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


@pytest.fixture(params=["small blocks", "default blocks", "chunks"])
def blocks(request, monkeypatch):
    """Once with blocks of 8 tokens and a batch cut in pieces, once as a CPU gets it, and once in
    the form of all other devices, a channel at a time."""
    if request.param == "small blocks":
        monkeypatch.setattr(scan_blocks, "BLOCK_STATES", 1)
        monkeypatch.setattr(scan_blocks, "ROW_STATES", 30)
        monkeypatch.setattr(conv, "BLOCK_ELEMENTS", 50)
    if request.param == "chunks":
        monkeypatch.setattr(devices, "on_cpu", lambda x: False)
        monkeypatch.setattr(scan, "PIECE_STATES", 1)


def scan_inputs(b, t, d, n, dtype=torch.float64, dt=(0.001, 0.1), seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=dtype)

    low, high = dt
    steps = low + (high - low) * torch.rand(b, t, d, generator=g, dtype=dtype)
    rates = -torch.arange(1, n + 1, dtype=dtype) * normal(d, n).exp()
    inputs = normal(b, t, d), steps, rates, normal(b, t, n), normal(b, t, n), normal(d)
    return [v.requires_grad_() for v in (*inputs, normal(b, d, n))]


def conv_inputs(b, t, c, k, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = (b, t, c), (c, k), (c,), (b, c, k - 1)
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in shapes]


def document_starts(b, t):
    return torch.rand(b, t, generator=torch.Generator().manual_seed(3)) < 0.2


def results(op, inputs, *args, **kwargs):
    """Output, last state, and the gradients of every input through both."""
    y, last = op(*inputs, *args, **kwargs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    loss = (y * weights).sum() + last.square().sum()
    return y, last, *torch.autograd.grad(loss, [v for v in inputs if v is not None])


def assert_same(fast, slow, names):
    for name, a, b in zip(("y", "last", *names), fast, slow, strict=True):
        assert_close(a, b, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_scan_equals_the_loop(length, packed, dtype, blocks):
    inputs = scan_inputs(3, length, 5, 4, dtype)
    starts = document_starts(3, length) if packed else None
    slow = results(scan.selective_scan_ref, inputs, starts)
    assert_same(results(scan.selective_scan, inputs, starts), slow, SCAN_NAMES)


@pytest.mark.parametrize("dt", [(0.0, 1e-9), (1e-3, 1e-2), (20.0, 100.0), (1e3, 1e6)])
def test_scan_with_decays_near_one_and_near_zero(dt, blocks):
    inputs = scan_inputs(2, 65, 3, 4, dt=dt)
    slow = results(scan.selective_scan_ref, inputs)
    assert_same(results(scan.selective_scan, inputs), slow, SCAN_NAMES)


def test_scan_without_state_and_skip(blocks):
    inputs = [*scan_inputs(3, 21, 5, 4)[:5], None, None]
    slow = results(scan.selective_scan_ref, inputs)
    assert_same(results(scan.selective_scan, inputs), slow, SCAN_NAMES[:5])


def test_scan_in_pieces_equals_one_call(blocks):
    u, dt, A, B, C, D, h = scan_inputs(3, 30, 5, 4)
    whole, last = scan.selective_scan(u, dt, A, B, C, D, h)
    parts = []
    for s in (slice(0, 9), slice(9, 10), slice(10, 30)):
        y, h = scan.selective_scan(u[:, s], dt[:, s], A, B[:, s], C[:, s], D, h)
        parts.append(y)
    assert_close(torch.cat(parts, 1), whole)
    assert_close(h, last)


def test_scan_step_is_one_token():
    u, dt, A, B, C, D, h = scan_inputs(2, 9, 5, 4)
    whole, last = scan.selective_scan_ref(u, dt, A, B, C, D, h)
    for t in range(9):
        y, h = scan.selective_scan_step(u[:, t], dt[:, t], A, B[:, t], C[:, t], D, h)
        assert_close(y, whole[:, t])
    assert_close(h, last)


def test_scan_forgets_other_documents_wholly(blocks):
    u, dt, A, B, C, D, h0 = scan_inputs(1, 20, 3, 4)
    starts = torch.arange(20)[None] == 11
    y, last = scan.selective_scan(u, dt, A, B, C, D, h0, starts)
    alone, alone_last = scan.selective_scan(
        *(v[:, 11:] if v.ndim == 3 and v.shape[1] == 20 else v for v in (u, dt, A, B, C, D))
    )
    assert_close(y[:, 11:], alone)
    assert_close(last, alone_last)
    (y[:, 11:].sum() + last.sum()).backward()
    assert not u.grad[:, :11].any()
    assert not h0.grad.any()


def test_scan_passes_gradcheck(blocks):
    inputs = scan_inputs(2, 11, 2, 2)
    assert torch.autograd.gradcheck(scan.selective_scan, (*inputs, document_starts(2, 11)))


def test_scan_keeps_its_arguments_and_states_without_gradients(blocks):
    inputs = [v.detach() for v in scan_inputs(2, 20, 3, 1)]
    copies = [v.clone() for v in inputs]
    y, last = scan.selective_scan(*inputs)
    last.zero_()
    y.zero_()
    for v, copy in zip(inputs, copies, strict=True):
        assert torch.equal(v, copy)


def test_scan_sums_in_float32(blocks):
    inputs = [v.detach() for v in scan_inputs(2, 40, 3, 4, torch.float32)]
    low = [v.bfloat16() if i in (0, 3, 4) else v for i, v in enumerate(inputs)]
    wide = [v.float() for v in low]
    with torch.autocast("cpu", torch.bfloat16):
        y, last = scan.selective_scan(*low)
    expected, expected_last = scan.selective_scan_ref(*wide)
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    assert_close(last, expected_last)
    assert_close(y.float(), expected, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("wrong", "shape"), [(1, (2, 5, 4)), (3, (2, 5, 3)), (5, (2,)), (6, (2, 4, 3))]
)
def test_scan_refuses_wrong_shapes(wrong, shape):
    inputs = scan_inputs(2, 5, 3, 4)
    inputs[wrong] = torch.zeros(shape)
    for op in (scan.selective_scan, scan.selective_scan_ref):
        with pytest.raises(ShapeError, match=rf"{SCAN_NAMES[wrong]} is .*expected"):
            op(*inputs)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_conv_equals_the_definition(length, packed, silu, blocks):
    starts = document_starts(3, length) if packed else None
    for k in (1, 2, 4):
        inputs = conv_inputs(3, length, 5, k)
        slow = results(conv.causal_conv1d_ref, inputs, starts, silu=silu)
        assert_same(results(conv.causal_conv1d, inputs, starts, silu=silu), slow, CONV_NAMES)


def test_conv_equals_torch():
    x, weight, bias, _ = conv_inputs(2, 17, 5, 4)
    y, state = conv.causal_conv1d(x, weight, bias)
    padded = torch.nn.functional.pad(x.mT, (3, 0))
    expected = torch.nn.functional.conv1d(padded, weight.unsqueeze(1), bias, groups=5).mT
    assert_close(y, expected)
    assert_close(state, x[:, -3:].mT)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_conv_by_one_kernel_equals_the_definition(monkeypatch, k, silu):
    """The path of CUDA, whose kernel knows no documents."""
    inputs = conv_inputs(3, 17, 5, k)
    slow = results(conv.causal_conv1d_ref, inputs, silu=silu)
    monkeypatch.setattr(conv, "_engine", lambda x, foreign: conv._by_kernel)
    assert_same(results(conv.causal_conv1d, inputs, silu=silu), slow, CONV_NAMES)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_conv_step_and_split(length):
    x, weight, bias, state = conv_inputs(2, length, 5, 4)
    whole, last = conv.causal_conv1d(x, weight, bias, state, silu=True)
    carried = state
    for t in range(length):
        y, carried = conv.causal_conv1d_step(x[:, t], weight, bias, carried, silu=True)
        assert_close(y, whole[:, t])
    assert_close(carried, last)
    half = length // 2
    if half:
        a, middle = conv.causal_conv1d(x[:, :half], weight, bias, state, silu=True)
        b, end = conv.causal_conv1d(x[:, half:], weight, bias, middle, silu=True)
        assert_close(torch.cat([a, b], 1), whole)
        assert_close(end, last)


def test_conv_does_not_see_other_documents():
    x, weight, bias, state = conv_inputs(1, 12, 3, 4)
    starts = torch.tensor([[0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1]]).bool()
    y, last = conv.causal_conv1d(x, weight, bias, state, starts)
    bounds = [0, 2, 6, 7, 11, 12]
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        alone, end = conv.causal_conv1d(x[:, a:b], weight, bias, state if i == 0 else None)
        assert_close(y[:, a:b], alone)
    assert_close(last, end)


def test_conv_refuses_wrong_shapes():
    x, weight, bias, state = conv_inputs(2, 5, 3, 4)
    with pytest.raises(ShapeError, match=r"state is \(2, 3, 2\); expected \(b, c, k-1\) .*k = 4"):
        conv.causal_conv1d(x, weight, bias, state[..., 1:])
    with pytest.raises(ShapeError, match=r"weight is \(2, 4\)"):
        conv.causal_conv1d_ref(x, weight[1:], bias)
