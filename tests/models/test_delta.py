"""The gated delta rule: the chunked form against the loop, the loop against matrices."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close
from torch.utils.flop_counter import FlopCounterMode

from kizzasi.errors import ShapeError
from kizzasi.models.ops.delta import (
    delta_rule,
    delta_rule_2,
    delta_rule_2_ref,
    delta_rule_flops,
    delta_rule_ref,
    delta_rule_step,
    l2_normalise,
)
from kizzasi.models.ops.wkv7 import wkv7

NAMES = ("q", "k", "v", "g", "beta", "s0")
widths_of_g = pytest.mark.parametrize("per_channel", [False, True])


def inputs(t, per_channel, *, b=2, h=2, d_k=6, d_v=5, g=(-3.0, 0.0), dtype=torch.float64):
    """q, k, v, g, beta, s0 with unit keys and beta in (0, 2)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    q, k = normal(b, t, h, d_k), F.normalize(normal(b, t, h, d_k), dim=-1)
    decay = uniform(b, t, h, d_k if per_channel else 1) * (g[1] - g[0]) + g[0]
    made = (q, k, normal(b, t, h, d_v), decay, 2 * uniform(b, t, h), normal(b, h, d_k, d_v))
    return [x.to(dtype).requires_grad_() for x in made]


def document_starts(t, share=0.1):
    return torch.rand(2, t, generator=torch.Generator().manual_seed(0)) < share


def values_and_gradients(run, tensors, starts=None):
    """y, the final state, and the gradients of all inputs under random weights."""
    *streams, s0 = tensors
    y, s = run(*streams, s0, starts)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (y, s)]
    gradients = torch.autograd.grad((y, s), tensors, [w.to(y) for w in weights])
    return dict(zip(("y", "s", *NAMES), (y, s, *gradients), strict=True))


def compare(tensors, starts=None):
    expected = values_and_gradients(delta_rule_ref, tensors, starts)
    for name, value in values_and_gradients(delta_rule, tensors, starts).items():
        assert_close(value, expected[name], msg=name)


@widths_of_g
@pytest.mark.parametrize("share", [None, 0.05, 0.5])
@pytest.mark.parametrize("length", [1, 2, 7, 31, 32, 33, 63, 64, 65, 100])
def test_chunked_is_the_loop(length, share, per_channel):
    starts = None if share is None else document_starts(length, share)
    compare(inputs(length, per_channel), starts)


@widths_of_g
@pytest.mark.parametrize(
    "g", [(0.0, 0.0), (-1e-3, -1e-6), (-30.0, 0.0), (-200.0, -100.0), (-1e5, -1e4)]
)
def test_any_decay_is_safe(g, per_channel):
    compare(inputs(70, per_channel, g=g))
    compare(inputs(70, per_channel, g=g), document_starts(70))
    exact = values_and_gradients(delta_rule_ref, inputs(70, per_channel, d_k=32, g=g))
    single = inputs(70, per_channel, d_k=32, g=g, dtype=torch.float32)
    for name, value in values_and_gradients(delta_rule, single).items():
        scale = exact[name].abs().max() + 1e-30
        assert_close((value / scale).float(), (exact[name] / scale).float(), msg=name)


@widths_of_g
def test_a_weak_decay_after_a_strong_one_keeps_its_digits(per_channel):
    """Sums of g are never differences, so that 1e6 before does not round 1e-3 after it."""
    tensors = inputs(64, per_channel, g=(-1e-2, -1e-3))
    with torch.no_grad():
        tensors[3][:, 5] = -1e6
    exact = delta_rule_ref(*tensors)
    single = delta_rule(*(x.float() for x in tensors))
    for value, expected in zip(single, exact, strict=True):
        assert_close(value, expected.float())


@widths_of_g
def test_one_key_reflected_at_every_token(per_channel):
    """The triangular system at its densest: every write meets every other, nothing decays."""
    q, k, v, g, beta, s0 = (x.detach() for x in inputs(65, per_channel, g=(0.0, 0.0)))
    k, beta = k[:, :1].expand_as(k), torch.full_like(beta, 2.0)
    compare([x.clone().requires_grad_() for x in (q, k, v, g, beta, s0)])


@widths_of_g
def test_the_loop_is_a_product_of_matrices(per_channel):
    """Decay first, removal second; the order only matters for one decay a channel."""
    q, k, v, g, beta, s0 = (x.detach() for x in inputs(9, per_channel, b=1, h=1))
    y, s = delta_rule_ref(q, k, v, g, beta, s0)
    fading_first = removing_first = s0[0, 0]
    for i in range(9):
        key, rate = k[0, i, 0], beta[0, i, 0]
        fade = torch.diag(g[0, i, 0].exp().expand(6))
        remove = torch.eye(6, dtype=torch.float64) - rate * torch.outer(key, key)
        write = rate * torch.outer(key, v[0, i, 0])
        fading_first = remove @ fade @ fading_first + write
        removing_first = fade @ remove @ removing_first + write
        assert_close(y[0, i, 0], fading_first.T @ q[0, i, 0])
    assert_close(s[0, 0], fading_first)
    assert torch.allclose(fading_first, removing_first) != per_channel


@widths_of_g
def test_rwkv7_can_express_it(per_channel):
    q, k, v, g, beta, s0 = inputs(40, per_channel, d_v=6, g=(-0.6, 0.0))
    y, s = delta_rule(q, k, v, g, beta, s0)
    rate, w = beta.unsqueeze(-1), g.expand_as(k)
    same, memory = wkv7(q, w, rate * k, v, -k * w.exp(), rate * k, s0.mT)
    assert_close(y, same)
    assert_close(s, memory.mT)


@widths_of_g
@pytest.mark.parametrize("cut", [1, 31, 32, 40])
def test_any_split_is_one_call(cut, per_channel):
    *streams, s0 = inputs(65, per_channel)
    starts = document_starts(65)
    whole, final = delta_rule(*streams, s0, starts)
    head, between = delta_rule(*(x[:, :cut] for x in streams), s0, starts[:, :cut])
    tail, end = delta_rule(*(x[:, cut:] for x in streams), between, starts[:, cut:])
    assert_close(torch.cat([head, tail], 1), whole)
    assert_close(end, final)


@widths_of_g
def test_a_document_sees_nothing_before_its_start(per_channel):
    *streams, s0 = inputs(70, per_channel)
    starts = torch.zeros(2, 70, dtype=torch.bool)
    starts[:, 45] = True
    y, s = delta_rule(*streams, s0, starts)
    alone, end = delta_rule(*(x[:, 45:] for x in streams))
    assert_close(y[:, 45:], alone)
    assert_close(s, end)
    leaks = torch.autograd.grad(y[:, 45:].sum() + s.sum(), (s0, streams[1], streams[3]))
    assert not leaks[0].any()
    assert not leaks[1][:, :45].any()
    assert not leaks[2][:, :46].any()


@widths_of_g
def test_step_is_one_token(per_channel):
    *streams, s0 = inputs(5, per_channel)
    s, ys = s0, []
    for i in range(5):
        y, s = delta_rule_step(s, *(x[:, i] for x in streams))
        ys.append(y)
    whole, final = delta_rule(*streams, s0)
    assert_close(torch.stack(ys, 1), whole)
    assert_close(s, final)


@widths_of_g
def test_arguments_are_not_written_to(per_channel):
    tensors = inputs(40, per_channel)
    copies = [x.detach().clone() for x in tensors]
    values_and_gradients(delta_rule, tensors, document_starts(40))
    assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))


@widths_of_g
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 7), (3, 64), (1, 100)])
def test_flops_are_counted(batch, length, per_channel):
    *streams, _ = inputs(length, per_channel, b=batch, h=3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        delta_rule(*streams)
    flops = delta_rule_flops(batch, length, 3, 6, 5, per_channel=per_channel)
    assert flops == counter.get_total_flops()


@pytest.mark.parametrize("largest", [1.0, 2.0])
def test_only_beta_above_one_turns_a_sign(largest):
    """What a key holds keeps its sign while nothing is written and no eigenvalue is negative."""
    _, k, v, g, beta, s0 = (x.detach() for x in inputs(100, False, g=(-0.1, 0.0)))
    k, beta = k[:, :1].expand_as(k), beta / 2 * largest
    y, _ = delta_rule(k, k, torch.zeros_like(v), g, beta, s0)
    held = k[:, :1, :, None] @ s0.unsqueeze(1)
    lowest = (y * held.squeeze(-2).sign()).min()
    assert lowest < -0.1 if largest > 1 else lowest > -1e-12


@widths_of_g
def test_parity_is_exact(per_channel):
    """A bit is beta = 2 times itself: each 1 reflects the one number that is remembered."""
    bits = torch.randint(2, (3, 200, 1), generator=torch.Generator().manual_seed(1)).double()
    one = torch.ones(3, 200, 1, 2 if per_channel else 1, dtype=torch.float64)
    key = one * torch.eye(one.shape[-1], dtype=torch.float64)[0]
    start = key[:, 0].unsqueeze(-1)
    y, _ = delta_rule(key, key, 0 * one[..., :1], 0 * one, 2 * bits, start)
    assert torch.equal(y[:, :, 0, 0], 1 - 2 * (bits[..., 0].cumsum(1) % 2))


def test_normalised_vectors_have_length_one_and_zero_stays_zero():
    x = torch.randn(4, 7, dtype=torch.float64)
    length = x.square().sum(-1, keepdim=True)
    assert_close(l2_normalise(x).square().sum(-1, keepdim=True), length / (length + 1e-6))
    assert not l2_normalise(torch.zeros(3)).any()


@pytest.mark.parametrize("run", [delta_rule, delta_rule_ref])
@pytest.mark.parametrize("name", ["q", "v", "g", "beta", "s0"])
def test_shapes_that_disagree_are_refused(name, run):
    tensors = dict(zip(NAMES, inputs(5, True), strict=True))
    tensors[name] = tensors[name][:, :, :1]
    with pytest.raises(ShapeError, match=f"^{name} is "):
        run(**tensors)


@pytest.mark.cuda
@widths_of_g
def test_cuda_is_the_cpu(per_channel):
    tensors, starts = inputs(100, per_channel), document_starts(100)
    expected = values_and_gradients(delta_rule, tensors, starts)
    moved = [x.detach().cuda().requires_grad_() for x in tensors]
    actual = values_and_gradients(delta_rule, moved, starts.cuda())
    for name, value in actual.items():
        assert_close(value.cpu(), expected[name], msg=name)


@widths_of_g
@pytest.mark.parametrize("share", [None, 0.2])
@pytest.mark.parametrize("length", [1, 7, 33, 65])
def test_two_gates_in_chunks_are_the_loop(length, share, per_channel):
    q, k, v, g, _, s0 = inputs(length, per_channel)
    gates = [torch.rand_like(x).requires_grad_() for x in (k, v)]
    starts, results = None if share is None else document_starts(length, share), []
    given = [q, k, v, g, *gates, s0]
    for run in (delta_rule_2, delta_rule_2_ref):
        out = run(*given, starts)
        weights = [torch.linspace(-1, 1, x.numel()).view(x.shape).to(x) for x in out]
        results.append((*out, *torch.autograd.grad(out, given, weights)))
    for fast, loop in zip(*results, strict=True):
        assert_close(fast, loop)


@pytest.mark.parametrize("run", [delta_rule_2, delta_rule_2_ref])
def test_two_gates_alike_are_one(run):
    q, k, v, g, beta, s0 = inputs(40, True)
    erase, write = (beta.unsqueeze(-1).expand_as(x) for x in (k, v))
    for ours, plain in zip(
        run(q, k, v, g, erase, write, s0), delta_rule(q, k, v, g, beta, s0), strict=True
    ):
        assert_close(ours, plain)


def test_misshapen_gates_are_named():
    q, k, v, g, _, s0 = inputs(3, True)
    with pytest.raises(ShapeError, match=r"write is \(2, 3, 2, 6\)"):
        delta_rule_2(q, k, v, g, k, k, s0)
