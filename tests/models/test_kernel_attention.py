"""Kernel attention: features against their kernels, elu by hand, redrawing."""

import math

import pytest
import torch
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models.adaptive import after_step
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers.kernel_attention import KernelAttentionSpec


def build(**fields):
    mixer = KernelAttentionSpec(2, **fields).build(LayerContext(16))
    mixer.reset_parameters(1, torch.Generator().manual_seed(0))
    return mixer.double()


@pytest.mark.parametrize("feature", ["favor", "gaussian", "laplace"])
def test_features_stand_for_their_kernel(feature):
    """Ratios of kernels, as the queries' own size cancels; the mean of many draws."""
    mixer = build(feature=feature, n_features=40_000)
    q, *keys = 0.8 * torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).double()
    k = torch.stack(keys)
    made = mixer._phi(k, False) @ mixer._phi(q, True)
    a, b = q * 8**-0.25, k * 8**-0.25
    apart = (a - b).norm(dim=-1)
    exact = {
        "favor": (b @ a).exp(),
        "gaussian": (-apart.square() / 2).exp(),
        "laplace": (-apart).exp(),
    }
    exact = exact[feature]
    assert ((made / made[0]) / (exact / exact[0]) - 1).abs().max() < 0.08


def test_orthogonal_directions_are_orthogonal_and_as_long_as_random_ones():
    rows = build(n_features=20).features
    for block in (rows[:8], rows[8:16]):
        gram = block @ block.mT
        assert_close(gram, gram.diagonal().diag(), dtype=torch.float32)
    assert 4 < rows.square().sum(1).mean() < 14
    loose = build(n_features=20, orthogonal=False).features[:8]
    assert (loose @ loose.mT).fill_diagonal_(0).abs().max() > 1


def test_elu_by_hand():
    mixer, x = build(feature="elu"), torch.randn(1, 5, 16, dtype=torch.float64)
    q, k, v = (p(x)[0].view(5, 2, 8) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))

    def positive(z):
        return torch.where(z > 0, z + 1, z.exp())

    scores = torch.einsum("thn,shn->hts", positive(q), positive(k)).tril()
    y = torch.einsum("hts,shn->thn", scores / scores.sum(-1, keepdim=True), v)
    assert_close(mixer(x).y[0], mixer.o_proj(y.flatten(1)))
    assert not list(mixer.buffers())


def test_directions_are_drawn_anew_in_training_alone():
    mixer = build(n_features=9, redraw=2)
    twin = build(n_features=9, redraw=2)
    start = mixer.features.clone()
    after_step(mixer)
    assert torch.equal(mixer.features, start)
    after_step(mixer)
    assert not torch.equal(mixer.features, start)
    for _ in range(2):
        after_step(twin)
    assert torch.equal(mixer.features, twin.features)
    later = mixer.features.clone()
    mixer.eval()
    for _ in range(4):
        after_step(mixer)
    assert torch.equal(mixer.features, later)
    assert mixer.bfloat16().features.dtype != torch.bfloat16


def test_a_resumed_training_draws_what_it_would_have_drawn():
    whole, resumed = build(n_features=9, redraw=2), build(n_features=9, redraw=2)
    for _ in range(3):
        after_step(whole)
    resumed.load_state_dict(whole.state_dict())
    for mixer in (whole, resumed):
        after_step(mixer)
    assert torch.equal(whole.features, resumed.features)


def test_large_inputs_stay_finite():
    for feature in ("favor", "gaussian", "laplace"):
        mixer = build(feature=feature).float()
        y = mixer(300 * torch.randn(1, 9, 16)).y
        assert y.isfinite().all()
    assert math.isinf(KernelAttentionSpec(2).context_window)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_heads": 3}, r"m.n_heads: 3 does not divide d_model 16"),
        ({"n_heads": 2, "head_dim": 256}, r"m.head_dim: heads of 256 .* at most 128, or elu"),
        ({"n_heads": 2, "n_features": 0}, r"m.n_features: 0 is not positive"),
        ({"n_heads": 2, "redraw": -1}, r"m.redraw: -1 is negative"),
        ({"n_heads": 2, "redraw": 5, "feature": "elu"}, r"m.redraw: elu draws nothing"),
    ],
)
def test_check_names_the_rule(fields, message):
    with pytest.raises(SpecError, match=message):
        KernelAttentionSpec(**fields).check(16, "m")
