"""RWKV-7's recurrence: the chunked form against the loop, at odd lengths and extreme decays."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close
from torch.utils.flop_counter import FlopCounterMode

from kizzasi.errors import ShapeError
from kizzasi.models.ops import wkv7 as ops
from kizzasi.models.ops.wkv7 import wkv7, wkv7_flops, wkv7_ref, wkv7_step

NAMES = ("r", "w", "k", "v", "a", "b", "s0")
STRONGEST = -0.6065306597  # -exp(-0.5), the fastest decay of RWKV-7


def inputs(t, *, b=2, h=2, n=8, w=(STRONGEST, -1e-3), dtype=torch.float64, seed=0):
    """r, w, k, v, a, b, s0 as an RWKV-7 layer makes them."""
    g = torch.Generator().manual_seed(seed)
    shape = (b, t, h, n)
    r, k, v, removal = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(4))
    decay = torch.rand(shape, generator=g, dtype=torch.float64) * (w[1] - w[0]) + w[0]
    rate = torch.rand(shape, generator=g, dtype=torch.float64)
    removal = F.normalize(removal, dim=-1)
    s0 = torch.randn(b, h, n, n, generator=g, dtype=torch.float64)
    made = (r, decay, k * n**-0.5, v, -removal, removal * rate, s0)
    return [x.to(dtype).requires_grad_() for x in made]


def document_starts(t, *, b=2, share=0.1, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(b, t, generator=g) < share


def weights(*outputs):
    g = torch.Generator().manual_seed(7)
    return [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in outputs]


def values_and_gradients(run, tensors, starts=None):
    """y, the final state, and the gradients of all inputs under random weights."""
    *streams, s0 = tensors
    y, s = run(*streams, s0, starts)
    gradients = torch.autograd.grad((y, s), tensors, weights(y, s))
    return dict(zip(("y", "s", *NAMES), (y, s, *gradients), strict=True))


def compare(tensors, starts=None):
    expected = values_and_gradients(wkv7_ref, tensors, starts)
    for name, value in values_and_gradients(wkv7, tensors, starts).items():
        assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("share", [None, 0.05, 0.5])
@pytest.mark.parametrize("length", [1, 2, 7, 31, 32, 33, 63, 64, 65, 100])
def test_chunked_is_the_loop(length, share):
    starts = None if share is None else document_starts(length, share=share)
    compare(inputs(length), starts)


@pytest.mark.parametrize(
    "w", [(STRONGEST, STRONGEST), (STRONGEST, -0.6), (-1e-3, -1e-6), (0.0, 0.0), (STRONGEST, 0.0)]
)
def test_both_ends_of_the_decay(w):
    compare(inputs(100, w=w))
    compare(inputs(100, w=w), document_starts(100))
    exact = values_and_gradients(wkv7_ref, inputs(100, n=32, w=w))
    single = values_and_gradients(wkv7, inputs(100, n=32, w=w, dtype=torch.float32))
    for name, value in single.items():
        scale = exact[name].abs().max()
        assert_close((value / scale).float(), (exact[name] / scale).float(), msg=name)


def test_one_key_looked_up_and_rewritten_at_every_token():
    """The triangular system at its densest: every lookup meets every write, nothing decays."""
    r, w, k, v, a, b, s0 = (x.detach() for x in inputs(65, w=(0.0, 0.0)))
    a = a[:, :1].expand_as(a)
    b = -a
    compare([x.clone().requires_grad_() for x in (r, w, k, v, a, b, s0)])


@pytest.mark.parametrize("run", [wkv7_ref, wkv7])
@pytest.mark.parametrize("cut", [1, 31, 32, 40, 64])
def test_any_split_is_one_call(run, cut):
    *streams, s0 = inputs(65)
    starts = document_starts(65)
    whole, final = run(*streams, s0, starts)
    head, between = run(*(x[:, :cut] for x in streams), s0, starts[:, :cut])
    tail, end = run(*(x[:, cut:] for x in streams), between, starts[:, cut:])
    assert_close(torch.cat([head, tail], 1), whole)
    assert_close(end, final)


def test_a_document_sees_nothing_before_its_start():
    *streams, s0 = inputs(70)
    starts = torch.zeros(2, 70, dtype=torch.bool)
    starts[:, 45] = True
    y, s = wkv7(*streams, s0, starts)
    alone, end = wkv7(*(x[:, 45:] for x in streams))
    assert_close(y[:, 45:], alone)
    assert_close(s, end)
    (leak,) = torch.autograd.grad(y[:, 45:].sum() + s.sum(), s0)
    assert not leak.any()


def test_step_is_one_token():
    *streams, s0 = inputs(5)
    s, ys = s0, []
    for i in range(5):
        y, s = wkv7_step(s, *(x[:, i] for x in streams))
        ys.append(y)
    whole, final = wkv7(*streams, s0)
    assert_close(torch.stack(ys, 1), whole)
    assert_close(s, final)


def test_no_uninitialised_memory_is_read():
    tensors, starts = inputs(70), document_starts(70)
    expected = values_and_gradients(wkv7, tensors, starts)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch then fills new memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        for name, value in values_and_gradients(wkv7, tensors, starts).items():
            assert torch.equal(value, expected[name]), name
    finally:
        torch.use_deterministic_algorithms(before)


def test_arguments_are_not_written_to():
    tensors = inputs(40)
    copies = [x.detach().clone() for x in tensors]
    values_and_gradients(wkv7, tensors, document_starts(40))
    assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))


def test_backward_under_autocast_stays_in_float32():
    tensors = inputs(40, dtype=torch.float32)
    expected = values_and_gradients(wkv7, tensors)
    *streams, s0 = tensors
    y, s = wkv7(*streams, s0)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad((y, s), tensors, weights(y, s))
    for name, value in zip(NAMES, gradients, strict=True):
        assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("w", [(-6.0, -2.0), (-60.0, 0.0), (-1e4, -1e3)])
@pytest.mark.parametrize("length", [1, 7, 33, 70])
@pytest.mark.parametrize("packed", [False, True])
def test_decays_too_strong_to_divide_by(length, w, packed):
    starts = document_starts(length) if packed else None
    compare(inputs(length, w=w), starts)
    exact = values_and_gradients(wkv7_ref, inputs(length, w=w), starts)
    single = values_and_gradients(wkv7, inputs(length, w=w, dtype=torch.float32), starts)
    for name, value in single.items():
        scale = exact[name].abs().max().clamp(min=1e-9)  # decays may have no gradient left
        assert_close((value / scale).float(), (exact[name] / scale).float(), msg=name)


def test_a_decay_of_zero_is_a_decay():
    tensors = inputs(40)
    with torch.no_grad():
        tensors[1][:, 17] = -torch.inf
        tensors[1][:, 25, :, 3] = -torch.inf
    compare(tensors)


@pytest.mark.parametrize("length", [1, 2, 7, 33, 64, 70])
@pytest.mark.parametrize("packed", [False, True])
def test_the_form_without_quotients_is_the_loop(length, packed, monkeypatch):
    """The path of CUDA, of compiled graphs and of torch.func."""
    monkeypatch.setattr(ops, "_divides", lambda w: False)
    compare(inputs(length), document_starts(length) if packed else None)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 7), (3, 64), (1, 100)])
def test_flops_are_counted(batch, length):
    *streams, _ = inputs(length, b=batch, h=3, n=4)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        wkv7(*streams)
    assert wkv7_flops(batch, length, heads=3, n=4) == counter.get_total_flops()


def test_inputs_of_several_shapes_are_refused():
    *streams, _ = inputs(5)
    for run in (wkv7, wkv7_ref):
        with pytest.raises(ShapeError, match=r"b is \(.*expected \(b, t, h, n\)"):
            run(*streams[:5], streams[5][:, 1:])


@pytest.mark.cuda
def test_cuda_is_the_cpu():
    tensors, starts = inputs(100), document_starts(100)
    expected = values_and_gradients(wkv7, tensors, starts)
    *streams, s0 = (x.detach().cuda().requires_grad_() for x in tensors)
    y, s = wkv7(*streams, s0, starts.cuda())
    gradients = torch.autograd.grad((y, s), (*streams, s0), weights(y, s))
    for name, value in zip(("y", "s", *NAMES), (y, s, *gradients), strict=True):
        assert_close(value.cpu(), expected[name], msg=name)
