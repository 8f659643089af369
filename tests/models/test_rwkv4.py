"""RWKV-4's recurrence and mixer: definition, extremes, gradients, initialisation, batches, pads."""

import math

import pytest
import torch
from tolerance import assert_close

from kizzasi.errors import ShapeError, SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.channels.rwkv_channel import RWKVChannelSpec
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers.rwkv4 import RWKV4Spec
from kizzasi.models.ops.wkv4 import WKV4State, wkv4, wkv4_ref, wkv4_step

DECAYS = [1e-8, 1e-3, 0.5, 5.0, 500.0]  # -log: from "never forgets" to "forgets at once"


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(t, *, scale=1.0, batch=2, dtype=torch.float64):
    w, u = -torch.tensor(DECAYS, dtype=dtype), draw(5, dtype=dtype, seed=1)
    k, v = draw(2, batch, t, 5, dtype=dtype, seed=t).unbind()
    return [w, u, scale * k, v]


def carried(*, empty_channel=False, dtype=torch.float64):
    num, top = draw(2, 2, 5, dtype=dtype, seed=7).unbind()
    den = 1 + draw(2, 5, dtype=dtype, seed=8).abs()
    if empty_channel:
        num[:, 2], den[:, 2], top[:, 2] = 0, 0, 0
    return WKV4State(num, den, top)


def meaning(state):
    """The average that is held, and the log of its weight: what num, den and max stand for."""
    return torch.stack([state.num / state.den, state.den.log() + state.max])


def results(run, args, state, starts):
    """Outputs, final state and the gradient of every input."""
    leaves = [x.requires_grad_() for x in (*args, *(state or ()))]
    y, after = run(*args, state, starts)
    loss = (y.sin() * draw(*y.shape, dtype=y.dtype, seed=3)).sum() + meaning(after).cos().sum()
    return [y, meaning(after), *after, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("t", [1, 2, 7, 63, 64, 65, 100])
@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("from_state", ["nothing", "memory", "half empty"])
def test_fast_form_equals_the_loop(t, scale, packed, from_state):
    starts = draw(2, t, seed=5) > 1 if packed else None
    state = None if from_state == "nothing" else carried(empty_channel=from_state == "half empty")
    fast = results(wkv4, inputs(t, scale=scale), state, starts)
    for actual, expected in zip(
        fast, results(wkv4_ref, inputs(t, scale=scale), state, starts), strict=True
    ):
        assert actual.isfinite().all()
        assert_close(actual, expected)


@pytest.mark.parametrize("run", [wkv4, wkv4_ref])
def test_equals_the_paper_s_sum_over_all_earlier_tokens(run):
    """Equation 16 written out: each token weighs exp(k + (distance - 1) w), the present one u."""
    w, u, k, v = inputs(20)
    y, state = run(w, u, k, v)
    for t in range(20):
        distance = torch.arange(t - 1, -1, -1, dtype=w.dtype)[:, None]
        weights = torch.cat([(distance * w + k[:, :t]), (u + k[:, t])[:, None]], 1).exp()
        assert_close(y[:, t], (weights * v[:, : t + 1]).sum(1) / weights.sum(1))
    weights = torch.arange(19, -1, -1, dtype=w.dtype)[:, None] * w + k
    assert_close(meaning(state)[1], weights.logsumexp(1))


@pytest.mark.parametrize("t", [1, 100])
def test_float32_survives_keys_whose_exponentials_overflow(t):
    wide = [x.double() for x in inputs(t, scale=1e4, dtype=torch.float32)]
    y, state = wkv4(*inputs(t, scale=1e4, dtype=torch.float32))
    expected, _ = wkv4_ref(*wide)
    assert all(x.isfinite().all() for x in (y, *state))
    right = (y - expected).abs() < 1e-3  # a near tie of two keys of 1e4 is decided by rounding
    assert right.double().mean() > 0.95


def test_an_empty_memory_does_not_weigh_however_small_the_first_key():
    w, u, k, v = inputs(3)
    nothing = WKV4State(*torch.zeros(3, 2, 5, dtype=w.dtype).unbind())
    for run in (wkv4, wkv4_ref):
        y, _ = run(w, u, k - 1000, v, nothing)
        assert_close(y[:, 0], v[:, 0])
    y, after = wkv4_step(nothing, w, u, k[:, 0] - 1000, v[:, 0])
    assert_close(y, v[:, 0])
    assert_close(after.max, k[:, 0] - 1000)


def test_shapes_that_disagree_are_named():
    w, u, k, v = inputs(3)
    bad = {"w": (w[:4], u, k, v), "v": (w, u, k, v[:, :2]), "k": (w, u, k[0], v[0])}
    for name, given in bad.items():
        with pytest.raises(ShapeError, match=f"^{name} is "):
            wkv4(*given)


def model_of(d=16, n_layers=3, **fields):
    block = BlockSpec(RWKV4Spec(**fields), RWKVChannelSpec(version=4), norm="layer")
    spec = ModelSpec(d, (block,) * n_layers, Tokens(23), norm="layer", embed_norm=True)
    model = build_model(spec, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64))
    return model


@torch.no_grad()
def test_every_row_of_a_batch_decodes_to_its_own_logits():
    """Three prompts decoded together give (3, vocab) per token, each row as if it were alone."""
    model = model_of(d_inner=24)
    ids = torch.randint(23, (3, 12), generator=torch.Generator().manual_seed(1))
    whole = model(ids).logits
    state = model(ids[:, :5]).state
    for t in range(5, 12):
        out = model.step(ids[:, t], state)
        state = out.state
        assert out.logits.shape == (3, 23)
        assert_close(out.logits, whole[:, t])
    for row in range(3):
        assert_close(model(ids[row : row + 1]).logits[0], whole[row])


@torch.no_grad()
def test_what_stands_left_of_a_prompt_as_padding_has_no_effect():
    """Whatever ids fill the left, prefill and decoding are those of the bare prompt."""
    model = model_of()
    prompt = torch.randint(23, (1, 6), generator=torch.Generator().manual_seed(1))
    alone = model(prompt)
    expected = model.step(prompt[:, 0], alone.state).logits
    for filling in (0, 7):
        padded = torch.cat([torch.full((1, 4), filling), prompt], 1)
        out = model(padded, mask=torch.arange(10)[None] >= 4)
        assert_close(out.logits[:, 4:], alone.logits)
        assert_close(model.step(prompt[:, 0], out.state).logits, expected)


def test_the_ramps_of_the_initialisation():
    """Against the formulas written per channel, in the middle of a model of 5 layers."""
    d, d_inner, index, n_layers = 8, 12, 2, 5
    mixer = RWKV4Spec(d_inner).build(LayerContext(d, index, n_layers))
    mixer.reset_parameters(n_layers, torch.Generator().manual_seed(0))
    depth, left = index / (n_layers - 1), 1 - index / n_layers
    for i in range(d):
        assert mixer.time_mix_k[i].item() == pytest.approx((i / d) ** left, abs=1e-6)
        assert mixer.time_mix_v[i].item() == pytest.approx((i / d) ** left + 0.3 * depth, abs=1e-6)
        assert mixer.time_mix_r[i].item() == pytest.approx((i / d) ** (left / 2), abs=1e-6)
    for i in range(d_inner):
        decay = -5 + 8 * (i / (d_inner - 1)) ** (0.7 + 1.3 * depth)
        first = math.log(0.3) + 0.5 * ((i + 1) % 3 - 1)
        assert mixer.time_decay[i].item() == pytest.approx(decay, abs=1e-5)
        assert mixer.time_first[i].item() == pytest.approx(first, abs=1e-6)
    for zero in (mixer.key, mixer.receptance, mixer.output):
        assert not zero.weight.any()
    assert_close(mixer.value.weight.T @ mixer.value.weight, 1.5 * torch.eye(d))


def test_decay_and_bonus_stay_in_float32_and_learn_faster():
    model = model_of()
    names = {id(p): name.rsplit(".", 1)[-1] for name, p in model.named_parameters()}
    rates = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in model.parameter_groups(lr=1.0, weight_decay=0.1)
        for p in group["params"]
    }
    assert rates["time_decay"] == (2.0, 0.0)
    assert rates["time_first"] == (3.0, 0.0)
    assert rates["time_mix_k"] == (1.0, 0.0)
    mixer = model.to(torch.bfloat16).blocks[0].mixer
    kept = {name for name, p in mixer.named_parameters() if p.dtype is not torch.bfloat16}
    assert kept == {"time_decay", "time_first"}
    state = mixer.init_state(2, dtype=torch.bfloat16)
    assert state.shift.dtype is torch.bfloat16
    assert {leaf.dtype for leaf in state.wkv} == {torch.float32}


def test_a_width_that_is_not_positive_is_refused():
    with pytest.raises(SpecError, match=r"mixer\.d_inner: 0 is not positive"):
        RWKV4Spec(d_inner=0).check(8, "mixer")
