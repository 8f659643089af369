"""Forgetting attention: blocks against the loop, the loop against the paper's formula."""

import pytest
import torch
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers import AttentionSpec, ForgettingSpec
from kizzasi.models.ops import forgetting as ops
from kizzasi.models.ops.attention import visibility

B, H, KV, T, BEFORE, D = 2, 4, 2, 11, 3, 3
DOCUMENT = torch.tensor([[0] * 8 + [1] * 4 + [2] * 2, [0] * 2 + [1] * 12])
POSITION = torch.tensor([[*range(8), *range(4), 0, 1], [0, 1, *range(12)]])


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype)


def inputs(strength=1.0):
    q, k = normal(B, H, T, D), normal(B, KV, T + BEFORE, D, seed=1)
    log_f = strength * torch.nn.functional.logsigmoid(normal(B, H, T, seed=3))
    return q, k, normal(B, KV, T + BEFORE, D, seed=2), log_f, -normal(B, H, BEFORE, seed=4).exp()


def seen(window=None):
    here = DOCUMENT[:, BEFORE:], POSITION[:, BEFORE:]
    return visibility(*here, DOCUMENT, POSITION, window)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(ops, "BLOCK", 4)


@pytest.mark.parametrize("strength", [0.0, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_blocks_equal_the_loop(strength, window, packed):
    """Outputs and the gradients of every input, after keys that came before."""
    results = []
    visible = seen(window) if packed or window else None
    if window and not packed:
        place = torch.arange(T + BEFORE)[None]
        same = torch.zeros_like(place)
        visible = visibility(same[:, BEFORE:], place[:, BEFORE:], same, place, window)
    for run in (ops.forgetting_attention, ops.forgetting_attention_ref):
        given = [x.requires_grad_() for x in inputs(strength)]
        y = run(*given, visible=visible, window=window)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        results.append((y, *torch.autograd.grad((y * weight).sum(), given)))
    for ours, loop in zip(*results, strict=True):
        assert_close(ours, loop)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_has_faded_to_nothing_is_left_out(dtype, monkeypatch):
    """Blocks of queries take no key whose weight is below the root of the smallest number, and
    heads that remember more keep theirs; results are those of all keys."""
    monkeypatch.setattr(ops, "BLOCK", 16)
    q, k, v = (normal(1, 3, 96, 4, seed=i, dtype=dtype) for i in range(3))
    q = q / 10
    log_f = -torch.tensor([60.0, 30.0, 9.0], dtype=dtype)[None, :, None].expand(1, 3, 96).clone()
    log_f[..., 40:44] = 0
    none = torch.zeros(1, 3, 0, dtype=dtype)
    widths = [keys.stop - keys.start for _, keys, _ in ops._masks(q, k, log_f, none, None)]
    assert max(widths) < 16 + 64, widths
    results = []
    for run in (ops.forgetting_attention, ops.forgetting_attention_ref):
        given = [x.clone().requires_grad_() for x in (q, k, v, log_f)]
        y = run(*given, none)
        results.append((y, *torch.autograd.grad((y * v.flip(2)).sum(), given)))
    for ours, loop in zip(*results, strict=True):
        assert_close(ours, loop)


def test_queries_without_a_number_keep_it_to_themselves():
    q, k, v, log_f, faded = inputs()
    sick = q.clone()
    sick[0, 1, 5] = torch.nan
    y = ops.forgetting_attention(sick, k, v, log_f, faded)
    expected = ops.forgetting_attention(q, k, v, log_f, faded)
    assert y[0, 1, 5].isnan().all()
    y[0, 1, 5] = expected[0, 1, 5]
    assert_close(y, expected)


@pytest.mark.parametrize("t", [1, 4, 11])
def test_the_loop_is_the_formula(t):
    """Differences of the running sum of log f, added to the scores."""
    q, k, v, log_f, faded = inputs()
    q, k, v, log_f = q[:, :, :t], k[:, :, : t + BEFORE], v[:, :, : t + BEFORE], log_f[:, :, :t]
    k, v = (x.repeat_interleave(H // KV, 1) for x in (k, v))
    total = log_f.cumsum(-1)
    lost = total[..., None] - torch.cat([-faded, total], -1)[:, :, None]
    later = torch.ones(t, t + BEFORE).tril(BEFORE) == 0
    scores = (q @ k.mT / D**0.5 + lost).masked_fill(later, -torch.inf)
    assert_close(ops.forgetting_attention_ref(q, k, v, log_f, faded), scores.softmax(-1) @ v)


def test_near_keys_keep_their_digits_in_float32(monkeypatch):
    """The running sum is about 8,000 at the end: its differences would be off by 1e-3."""
    monkeypatch.setattr(ops, "BLOCK", 128)
    t = 4096
    q, k, v = (normal(1, 1, t, 2, seed=i) for i in range(3))
    log_f = -2 - normal(1, 1, t, seed=3).sigmoid()
    none = torch.zeros(1, 1, 0, dtype=torch.float64)
    exact = ops.forgetting_attention(q, k, v, log_f, none)
    given = [x.float() for x in (q, k, v, log_f, none)]
    assert (ops.forgetting_attention(*given) - exact).abs().max() < 3e-6
    assert (ops.fading(given[3])[0, 0, -9:] - ops.fading(log_f)[0, 0, -9:]).abs().max() < 3e-6


@pytest.mark.parametrize("run", [ops.forgetting_attention, ops.forgetting_attention_ref])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_other_documents_may_be_nan(run, value):
    q, k, v, log_f, faded = inputs()
    expected = run(q, k, v, log_f, faded, visible=seen())
    q[0, 0, 4] = k[0, 1, 4 + BEFORE] = log_f[0, 2, 4] = faded[1, 0, 1] = value
    log_f = log_f.requires_grad_()
    y = run(q, k, v, log_f, faded, visible=seen())
    touched = DOCUMENT[:, BEFORE:] == torch.tensor([[0], [5]])  # row 1: of the past alone
    clean = ~touched[:, None, :, None].expand_as(y)
    assert_close(y[clean], expected[clean])
    (grad,) = torch.autograd.grad(y[clean].sum(), log_f)
    assert grad[~touched[:, None].expand_as(grad)].isfinite().all()


def test_an_open_gate_is_plain_attention():
    spec = ForgettingSpec(n_heads=4, n_kv_heads=2, position="rope", rope_theta=1e4)
    ours = spec.build(LayerContext(16)).double()
    plain = AttentionSpec(n_heads=4, n_kv_heads=2).build(LayerContext(16)).double()
    weights = ours.state_dict()
    with torch.no_grad():
        ours.f_proj.weight.zero_()
        ours.f_proj.bias.fill_(200.0)
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    x = normal(2, 9, 16)
    assert_close(ours(x).y, plain(x).y)


def test_a_shut_gate_sees_nothing_but_its_token():
    layer = ForgettingSpec(n_heads=2).build(LayerContext(4)).double()
    with torch.no_grad():
        layer.f_proj.weight.zero_()
        layer.f_proj.bias.fill_(-1e4)
    x = normal(1, 6, 4)
    alone = layer(x.transpose(0, 1)).y.transpose(0, 1)
    assert_close(layer(x).y, alone)


def test_a_window_is_all_that_is_seen_and_remembered():
    layer = ForgettingSpec(n_heads=2, window=3).build(LayerContext(4)).double()
    x = normal(1, 9, 4).requires_grad_()
    out = layer(x)
    (grad,) = torch.autograd.grad(out.y[0, 7].sum(), x)
    assert (grad[0].abs().sum(-1) > 0).tolist() == [t in (5, 6, 7) for t in range(9)]
    assert out.state.k.shape[2] == layer.spec.context_window == 3
    log_f = torch.nn.functional.logsigmoid(layer.f_proj(x)).mT
    assert_close(out.state.faded.amin(2), log_f[..., 7:].sum(-1, keepdim=True))
    assert (out.state.faded.amax(2) == 0).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_heads": 3}, r"m\.n_heads: 3 does not divide d_model 8"),
        ({"n_heads": 4, "n_kv_heads": 3}, r"m\.n_kv_heads: 3 does not divide n_heads 4"),
        ({"n_heads": 2, "window": 0}, r"m\.window: 0 is not positive"),
        ({"n_heads": 2, "rope_theta": 1.0}, r"m\.rope_theta: 1\.0 is not above 1"),
        ({"n_heads": 2, "head_dim": 3, "position": "rope"}, r"m\.head_dim: 3 entries .* pairs"),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(SpecError, match=message):
        ForgettingSpec(**fields).check(8, "m")
