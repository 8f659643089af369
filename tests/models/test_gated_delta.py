"""Gated DeltaNet: parity with Qwen3-Next, what negative eigenvalues buy, initialisation, rules."""

import pytest
import torch
from peers import cache_argument
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers.gated_delta import GatedDeltaSpec

D_MODEL = 24
LAYER = LayerContext(D_MODEL, n_layers=3)
GROUPED = GatedDeltaSpec(n_heads=6, n_key_heads=2, key_head_dim=8, value_head_dim=5)


def draw(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def build(spec, dtype=torch.float32):
    """A mixer whose parameters all matter: its initialisation plus noise."""
    mixer = spec.build(LAYER)
    generator = torch.Generator().manual_seed(0)
    mixer.reset_parameters(3, generator)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return mixer.to(dtype)


def qwen3_next(spec):
    """The layer of transformers with the sizes of a spec, and an empty cache for it."""
    pytest.importorskip("transformers")
    from transformers.cache_utils import DynamicCache
    from transformers.models.qwen3_next import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    d_k, d_v = spec.widths(D_MODEL)
    config = Qwen3NextConfig(
        hidden_size=D_MODEL,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_value_heads=spec.n_heads,
        linear_num_key_heads=spec.key_heads,
        linear_key_head_dim=d_k,
        linear_value_head_dim=d_v,
        linear_conv_kernel_dim=spec.d_conv,
        rms_norm_eps=spec.norm_eps,
    )
    return Qwen3NextGatedDeltaNet(config, 0), DynamicCache(config=config)


@pytest.mark.parametrize("spec", [GROUPED, GatedDeltaSpec(n_heads=3, norm_eps=1e-3)])
def test_parity_with_qwen3_next(spec):
    """Prefill of 70 tokens and 3 steps, in float32: transformers casts to it within the layer."""
    ours, (theirs, cache) = build(spec), qwen3_next(spec)
    theirs.load_state_dict(ours.state_dict())
    x = draw(2, 73, D_MODEL)
    with torch.no_grad():
        out = ours(x[:, :70])
        assert_close(out.y, theirs(x[:, :70], **{cache_argument(theirs): cache}))
        assert_close(out.state.memory, cache.get_recurrent_state(0, state_idx=0))
        state = out.state
        for t in range(70, 73):
            y, state, *_ = ours.step(x[:, t], state)
            assert_close(y, theirs(x[:, t : t + 1], **{cache_argument(theirs): cache})[:, 0])
        assert_close(state.memory, cache.get_recurrent_state(0, state_idx=0))
        last = cache.get_conv_state(0, state_idx=0)[..., 1 - spec.d_conv :]
        assert_close(state.conv, last)


def parity_mixer(negative_eigenvalues):
    """One head of one number. Inputs: a 1, the bit, and a 1 at the first token only.

    The first token writes 1 with beta = 1. Later ones write 0, with beta = 0 for the bit 0 and, for
    the bit 1, the largest beta: 2 with negative eigenvalues, 1 without. Keys and gates are
    constant; the filter passes the present token. Large numbers saturate sigmoids, drown epsilons.
    """
    spec = GatedDeltaSpec(
        n_heads=1, key_head_dim=1, gated=False, negative_eigenvalues=negative_eigenvalues
    )
    mixer = spec.build(LayerContext(3)).double()
    large = 1e6
    with torch.no_grad():
        for p in mixer.parameters():
            p.zero_()
        mixer.in_proj_qkvz.weight[[0, 1, 3], 0] = large  # q, k, z
        mixer.in_proj_qkvz.weight[2, 2] = large  # v
        first = large if negative_eigenvalues else 2 * large  # beta = 2 sigmoid(0) or sigmoid(inf)
        mixer.in_proj_ba.weight[0] = torch.tensor([-large, 2 * large, first])
        mixer.conv1d.weight[:, 0, -1] = 1.0
        mixer.norm.weight.fill_(1.0)
        mixer.out_proj.weight[0, 0] = 1.0 / large
    return mixer


def parity_inputs(bits):
    x = torch.zeros(*bits.shape, 3, dtype=torch.float64)
    x[..., 0], x[..., 1], x[:, 0, 2] = 1.0, bits, 1.0
    return x


def test_negative_eigenvalues_represent_parity():
    bits = torch.randint(2, (4, 201), generator=torch.Generator().manual_seed(1))
    bits[:, 0] = 0
    x, expected = parity_inputs(bits), (1 - 2 * (bits.cumsum(1) % 2)).double()
    mixer = parity_mixer(True)
    out = mixer(x)
    assert torch.equal(out.y[..., 0].round(), expected)
    assert_close(out.y[..., 0], expected)
    state = mixer.init_state(4, dtype=torch.float64)
    for t in range(201):
        y, state, *_ = mixer.step(x[:, t], state)
        assert torch.equal(y[:, 0].round(), expected[:, t])
    positive = parity_mixer(False)(x).y[..., 0]
    assert (positive >= 0).all()
    assert not torch.equal(positive.round(), expected)


def test_parameters_are_those_of_qwen3_next():
    names = "in_proj_qkvz.weight in_proj_ba.weight conv1d.weight A_log dt_bias norm.weight "
    assert set(build(GROUPED).state_dict()) == {*names.split(), "out_proj.weight"}
    shapes = {name: tuple(p.shape) for name, p in build(GROUPED).named_parameters()}
    assert shapes["in_proj_qkvz.weight"] == (2 * 2 * 8 + 2 * 6 * 5, D_MODEL)
    assert shapes["in_proj_ba.weight"] == (12, D_MODEL)
    assert shapes["conv1d.weight"] == (2 * 2 * 8 + 6 * 5, 1, 4)
    bare = build(GatedDeltaSpec(n_heads=2, gated=False)).state_dict()
    assert not {"A_log", "dt_bias"} & set(bare)
    assert bare["in_proj_ba.weight"].shape == (2, D_MODEL)


def test_ungated_never_fades():
    """With beta almost 0, DeltaNet keeps its memory and gated DeltaNet loses it."""
    memories = []
    for gated in (False, True):
        mixer = build(GatedDeltaSpec(n_heads=2, gated=gated), torch.float64)
        with torch.no_grad():
            mixer.in_proj_ba.weight.zero_()
            if gated:
                mixer.dt_bias.fill_(3.0)
        x, state = (
            draw(1, 30, D_MODEL, dtype=torch.float64),
            mixer.init_state(1, dtype=torch.float64),
        )
        state = state._replace(memory=torch.ones_like(state.memory))
        memories.append(mixer(0 * x, state).state.memory)
    assert_close(memories[0], torch.ones_like(memories[0]))
    assert memories[1].max() < 0.1


def test_initial_decays_and_steps():
    mixer = GatedDeltaSpec(n_heads=500, key_head_dim=1).build(LAYER)
    mixer.reset_parameters(3, torch.Generator().manual_seed(0))
    rates, dt = mixer.A_log.exp(), torch.nn.functional.softplus(mixer.dt_bias)
    assert 0.009 < rates.min() < 0.3
    assert 15 < rates.max() < 16.01
    assert 0.9e-3 < dt.min() < 1.1e-3
    assert 0.09 < dt.max() < 0.101
    assert abs(dt.log().mean() - torch.tensor(1e-2).log()) < 0.2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (GatedDeltaSpec(5), "n_heads: d_model 24 is not divisible by 5 heads"),
        (GatedDeltaSpec(4, n_key_heads=3), "n_key_heads: 3 does not divide n_heads 4"),
        (GatedDeltaSpec(4, key_head_dim=0), "key_head_dim: 0 is not positive"),
        (GatedDeltaSpec(0), "n_heads: 0 is not positive"),
        (GatedDeltaSpec(4, d_conv=0), "d_conv: 0 is not positive"),
    ],
)
def test_broken_rules_are_named(spec, message):
    with pytest.raises(SpecError, match=message):
        spec.check(D_MODEL, "mixer")
