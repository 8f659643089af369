"""Linear attention with decay: the joined blocks against the loop, at every length and decay."""

import pytest
import torch
from tolerance import assert_close
from torch.utils.flop_counter import FlopCounterMode

from kizzasi.errors import ShapeError
from kizzasi.models.ops.linear_attention import (
    linear_attention,
    linear_attention_flops,
    linear_attention_ref,
    linear_attention_step,
)

NAMES = ("q", "k", "v", "w", "u", "s0")
B, H, N, M = 2, 3, 4, 5
DECAYS = {"per channel": (B, None, H, N), "per head": (B, None, H, 1), "static": (1, 1, H, N)}
every_decay = pytest.mark.parametrize("shape", DECAYS.values(), ids=DECAYS)
both_readings = pytest.mark.parametrize("bonus", [False, True], ids=["after", "bonus"])


def inputs(t, *, shape=DECAYS["per channel"], w=(-1.0, 0.0), bonus=False, dtype=torch.float64):
    """q, k, v, w, u, s0; u is None without a bonus. w lies between two bounds."""
    g = torch.Generator().manual_seed(t)

    def draw(*size):
        return torch.randn(size, generator=g, dtype=torch.float64)

    decay = torch.rand([t if x is None else x for x in shape], generator=g, dtype=torch.float64)
    q, k, v, s0 = draw(B, t, H, N), draw(B, t, H, N), draw(B, t, H, M), draw(B, H, N, M)
    made = (q, k, v, w[0] + (w[1] - w[0]) * decay, draw(H, N) if bonus else None, s0)
    return [None if x is None else x.to(dtype).requires_grad_() for x in made]


def document_starts(t, share=0.1):
    return torch.rand(B, t, generator=torch.Generator().manual_seed(t)) < share


def values_and_gradients(run, tensors, starts=None):
    """y, the final memory, and the gradients of all inputs under fixed weights."""
    y, s = run(*tensors, starts)
    weights = [torch.linspace(-1, 1, x.numel()).view_as(x).to(x) for x in (y, s)]
    given = {n: x for n, x in zip(NAMES, tensors, strict=True) if x is not None}
    gradients = torch.autograd.grad((y, s), list(given.values()), weights)
    return {"y": y, "s": s, **dict(zip(given, gradients, strict=True))}


def compare(tensors, starts=None):
    expected = values_and_gradients(linear_attention_ref, tensors, starts)
    for name, value in values_and_gradients(linear_attention, tensors, starts).items():
        assert_close(value, expected[name], msg=name)


@both_readings
@every_decay
@pytest.mark.parametrize("length", [1, 2, 7, 31, 32, 33, 63, 64, 65, 100])
def test_joined_blocks_are_the_loop(length, shape, bonus):
    tensors = inputs(length, shape=shape, bonus=bonus)
    compare(tensors)
    compare(tensors, document_starts(length))
    compare(tensors, document_starts(length, 0.5))


@both_readings
@every_decay
@pytest.mark.parametrize(
    "w", [(0.0, 0.0), (-1e-9, 0.0), (-20.0, -20.0), (-20.0, 0.0), (-300.0, -20.0)]
)
def test_no_decay_is_too_weak_or_too_strong(w, shape, bonus):
    compare(inputs(70, shape=shape, w=w, bonus=bonus), document_starts(70))
    exact = values_and_gradients(linear_attention_ref, inputs(70, shape=shape, w=w, bonus=bonus))
    single = inputs(70, shape=shape, w=w, bonus=bonus, dtype=torch.float32)
    for name, value in values_and_gradients(linear_attention, single).items():
        scale = exact[name].abs().max().clamp(min=1e-6)
        assert_close((value / scale).float(), (exact[name] / scale).float(), msg=name)


@both_readings
def test_channels_that_never_and_at_once_forget_side_by_side(bonus):
    tensors = inputs(65, bonus=bonus)
    pattern = torch.tensor([0.0, -20.0, -1e-4, -3.0], dtype=torch.float64)
    tensors[3] = pattern.expand(B, 65, H, N).clone().requires_grad_()
    compare(tensors, document_starts(65))


def test_it_is_the_sum_over_all_earlier_tokens():
    """The definition unrolled, in two lines."""
    q, k, v, w, u, _ = inputs(20, bonus=True)
    total = w.cumsum(1)
    until = torch.cat([torch.zeros_like(total[:, :1]), total[:, :-1]], 1)
    for reach, own, diagonal, run in ((total, None, 0, q), (until, u, -1, q)):
        fade = (reach[:, :, None] - total[:, None]).masked_fill(
            ~torch.ones(20, 20, dtype=torch.bool).tril(diagonal)[..., None, None], -torch.inf
        )
        scores = torch.einsum("bthn,btshn,bshn->bhts", run, fade.exp(), k)
        if own is not None:
            scores = scores + torch.diag_embed((q * own * k).sum(-1).mT)
        y = torch.einsum("bhts,bshm->bthm", scores, v)
        assert_close(linear_attention(q, k, v, w, own)[0], y)


@both_readings
@pytest.mark.parametrize("run", [linear_attention_ref, linear_attention])
@pytest.mark.parametrize("cut", [1, 32, 40, 64])
def test_any_split_is_one_call(run, cut, bonus):
    *streams, u, s0 = inputs(65, bonus=bonus)
    starts = document_starts(65)
    whole, final = run(*streams, u, s0, starts)
    head, between = run(*(x[:, :cut] for x in streams), u, s0, starts[:, :cut])
    tail, end = run(*(x[:, cut:] for x in streams), u, between, starts[:, cut:])
    assert_close(torch.cat([head, tail], 1), whole)
    assert_close(end, final)


@both_readings
def test_a_document_sees_nothing_before_its_start(bonus):
    *streams, u, s0 = inputs(70, bonus=bonus)
    starts = torch.zeros(2, 70, dtype=torch.bool)
    starts[:, 45] = True
    y, s = linear_attention(*streams, u, s0, starts)
    alone, end = linear_attention(*(x[:, 45:] for x in streams), u)
    assert_close(y[:, 45:], alone)
    assert_close(s, end)
    (leak,) = torch.autograd.grad(y[:, 45:].sum() + s.sum(), s0)
    assert not leak.any()


@both_readings
def test_step_is_one_token(bonus):
    *streams, u, s0 = inputs(5, bonus=bonus)
    s, ys = s0, []
    for i in range(5):
        y, s = linear_attention_step(s, *(x[:, i] for x in streams), u)
        ys.append(y)
    whole, final = linear_attention(*streams, u, s0)
    assert_close(torch.stack(ys, 1), whole)
    assert_close(s, final)


def test_it_can_be_differentiated_twice():
    tensors = inputs(5, bonus=True)
    assert torch.autograd.gradgradcheck(linear_attention, tensors, fast_mode=True)


def test_arguments_are_not_written_to():
    tensors = inputs(40, bonus=True)
    copies = [x.detach().clone() for x in tensors]
    values_and_gradients(linear_attention, tensors, document_starts(40))
    assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))


@both_readings
@pytest.mark.parametrize("length", [1, 7, 64, 100])
def test_flops_are_counted(length, bonus):
    tensors = inputs(length, bonus=bonus)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear_attention(*tensors)
    assert linear_attention_flops(B, length, H, N, M) == counter.get_total_flops()


@pytest.mark.parametrize("run", [linear_attention_ref, linear_attention])
@pytest.mark.parametrize(
    ("which", "name"), [(1, "k"), (2, "v"), (3, "w"), (4, "u"), (5, "s0"), (0, "k")]
)
def test_a_shape_that_does_not_fit_is_named(run, which, name):
    tensors = inputs(6, bonus=True)
    tensors[which] = tensors[which][:, 1:]
    with pytest.raises(ShapeError, match=rf"{name} is \("):
        run(*tensors)


def test_an_empty_sequence_is_refused():
    with pytest.raises(ShapeError, match="t >= 1"):
        linear_attention(*(x[:, :0] for x in inputs(3)[:4]))


@pytest.mark.cuda
@both_readings
def test_cuda_is_the_cpu(bonus):
    tensors, starts = inputs(100, bonus=bonus), document_starts(100)
    expected = values_and_gradients(linear_attention, tensors, starts)
    moved = [None if x is None else x.detach().cuda().requires_grad_() for x in tensors]
    for name, value in values_and_gradients(linear_attention, moved, starts.cuda()).items():
        assert_close(value.cpu(), expected[name], msg=name)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("w", [-1e-3, -1e-5, -1e-7, -2e-8])
def test_weak_decays_are_not_lost_in_float32(w, fixed):
    """exp(-2e-8) is 1 in float32, and 8000 of them are not."""
    q, k, v, *_ = (None if x is None else x.detach() for x in inputs(8192, dtype=torch.float32))
    decay = torch.full((1, 1, H, N) if fixed else (B, 8192, H, N), w)
    _, s = linear_attention(q, k, v, decay)
    _, exact = linear_attention(*(x.double() for x in (q, k, v, decay)))
    assert (s - exact).abs().max() / exact.abs().max() < 4e-6
