"""Kimi delta attention: parity with transformers, names as on disk, initialisation, rules."""

import pytest
import torch
from peers import cache_argument
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers.kda import KDASpec

D_MODEL = 24
LAYER = LayerContext(D_MODEL, n_layers=3)
SPECS = [KDASpec(n_heads=3), KDASpec(n_heads=2, head_dim=5, d_conv=3, norm_eps=1e-3)]


def build(spec):
    """A mixer whose parameters all matter: its initialisation plus noise."""
    mixer = spec.build(LAYER)
    generator = torch.Generator().manual_seed(0)
    mixer.reset_parameters(3, generator)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return mixer


def kimi_linear(spec, ours):
    """The layer of transformers with our weights, and an empty cache for it."""
    pytest.importorskip("transformers.models.kimi_linear")
    from transformers.cache_utils import DynamicCache
    from transformers.models.kimi_linear import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    config = KimiLinearConfig(
        hidden_size=D_MODEL,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        mlp_layer_types=["dense"],
        linear_num_heads=spec.n_heads,
        linear_head_dim=spec.width(D_MODEL),
        linear_conv_kernel_dim=spec.d_conv,
        rms_norm_eps=spec.norm_eps,
    )
    theirs, weights = KimiLinearDeltaAttention(config, 0), ours.state_dict()
    convs = [weights.pop(f"{name}_conv1d.weight") for name in "qkv"]
    for name in ("f_a_proj.weight", "f_b_proj.weight", "dt_bias", "A_log"):
        weights[f"forget_gate.{name}"] = weights.pop(name)
    weights["forget_gate.A_log"] = weights["forget_gate.A_log"].view(1, 1, -1, 1)
    theirs.load_state_dict({**weights, "conv1d.weight": torch.cat(convs)})
    return theirs, DynamicCache(config=config)


@pytest.mark.parametrize("spec", SPECS)
def test_parity_with_kimi_linear(spec):
    """Prefill of 70 tokens and 3 steps, in float32: transformers casts to it within the layer."""
    ours = build(spec)
    theirs, cache = kimi_linear(spec, ours)
    x = torch.randn(2, 73, D_MODEL, generator=torch.Generator().manual_seed(1))
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


def test_parameters_are_named_as_on_disk():
    matrices = "q_proj k_proj v_proj q_conv1d k_conv1d v_conv1d f_a_proj f_b_proj b_proj g_a_proj "
    matrices += "g_b_proj o_norm o_proj"
    names = {f"{name}.weight" for name in matrices.split()}
    assert set(build(SPECS[0]).state_dict()) == {*names, "A_log", "dt_bias"}


def test_every_channel_fades_at_its_own_rate():
    mixer = build(SPECS[0])
    with torch.no_grad():
        mixer.dt_bias.copy_(torch.linspace(-20, 1, 24))
        mixer.f_b_proj.weight.zero_()
        mixer.b_proj.weight.zero_()
        mixer.k_conv1d.weight.zero_()
    state = mixer.init_state(1)
    state = state._replace(memory=torch.ones_like(state.memory))
    memory = mixer(torch.ones(1, 4, D_MODEL), state).state.memory[0]
    dt = torch.nn.functional.softplus(mixer.dt_bias.detach()).view(3, 8)
    kept = (-4 * mixer.A_log.detach().exp().unsqueeze(-1) * dt).exp()
    assert_close(memory, kept.unsqueeze(-1).expand_as(memory))


def test_initial_decays_and_steps():
    mixer = KDASpec(n_heads=500, head_dim=2).build(LAYER)
    mixer.reset_parameters(3, torch.Generator().manual_seed(0))
    rates, dt = mixer.A_log.exp(), torch.nn.functional.softplus(mixer.dt_bias)
    assert 0.99 < rates.min() < 1.2
    assert 15 < rates.max() < 16.01
    assert 0.9e-3 < dt.min() < 1.1e-3
    assert 0.09 < dt.max() < 0.101


def twin(spec, ours, **changes):
    """A layer of another spec with our weights, and `changes` in place of some."""
    other = spec.build(LAYER).double()
    other.load_state_dict({**ours.state_dict(), **changes})
    return other


def test_channel_gates_that_are_all_alike_are_beta():
    """Gated DeltaNet-2 is KDA where b = w = beta (arXiv:2605.22791)."""
    plain = build(KDASpec(n_heads=3, negative_eigenvalues=False)).double()
    beta = plain.b_proj.weight.detach().repeat_interleave(8, 0)
    gates = {"b_proj.weight": beta, "w_proj.weight": beta}
    gated = twin(KDASpec(n_heads=3, channel_gates=True), plain, **gates)
    x = torch.randn(2, 37, D_MODEL, dtype=torch.float64)
    assert_close(gated(x).y, plain(x).y)
    with torch.no_grad():  # each gate by itself changes the result, and both are read
        gated.w_proj.weight[3] += 0.1
        assert not torch.allclose(gated(x).y, plain(x).y, rtol=1e-3)
        gated.w_proj.weight[3] -= 0.1
        gated.b_proj.weight[3] += 0.1
        assert not torch.allclose(gated(x).y, plain(x).y, rtol=1e-3)


def test_heads_of_values_share_keys_decays_and_gates():
    """Two heads of values a head of keys are two heads whose keys, decays and gates are equal."""
    ours = build(KDASpec(n_heads=2, n_value_heads=4, head_dim=6)).double()

    def twice(t):  # rows of every head once more
        heads = t.detach().unflatten(0, (2, -1))
        return heads.repeat_interleave(2, 0).flatten(0, 1)

    shared = ["q_proj", "k_proj", "q_conv1d", "k_conv1d", "f_b_proj", "b_proj"]
    names = [f"{name}.weight" for name in shared] + ["A_log", "dt_bias"]
    changes = {name: twice(t) for name, t in ours.state_dict().items() if name in names}
    wide = twin(KDASpec(n_heads=4, head_dim=6), ours, **changes)
    x = torch.randn(2, 37, D_MODEL, dtype=torch.float64)
    assert_close(ours(x).y, wide(x).y)


def test_decays_above_a_floor():
    """g = floor sigmoid(exp(A_log) (f + dt_bias)), as fla's bounded gate."""
    mixer = build(KDASpec(n_heads=3, gate_floor=-2.0, conv=False)).double()
    with torch.no_grad():
        mixer.dt_bias.copy_(torch.linspace(-1, 1, 24))
        mixer.f_b_proj.weight.zero_()
        mixer.k_proj.weight.zero_()
    state = mixer.init_state(1, dtype=torch.float64)
    state = state._replace(memory=torch.ones_like(state.memory))
    memory = mixer(torch.ones(1, 1, D_MODEL, dtype=torch.float64), state).state.memory[0]
    rate, bias = mixer.A_log.detach().exp().unsqueeze(-1), mixer.dt_bias.detach().view(3, 8)
    kept = (-2.0 / (1 + (-rate * bias).exp())).exp()
    assert_close(memory, kept.unsqueeze(-1).expand_as(memory))


def test_a_write_may_turn_the_sign_of_what_it_finds():
    mixer = build(KDASpec(n_heads=3, negative_eigenvalues=True, conv=False)).double()
    with torch.no_grad():
        mixer.A_log.fill_(-30.0)  # nothing fades
        mixer.v_proj.weight.zero_()
        mixer.b_proj.weight.copy_(torch.full((3, D_MODEL), 9.0))
    x = torch.ones(1, 1, D_MODEL, dtype=torch.float64)
    k = torch.nn.functional.silu(mixer.k_proj(x)).view(3, 8)
    k = k / k.norm(dim=-1, keepdim=True)
    memory = k.unsqueeze(-1) * torch.ones(1, 1, 8, dtype=torch.float64)
    after = mixer(x, mixer.init_state(1)._replace(memory=memory[None])).state.memory[0]
    assert (after + memory).abs().max() < 1e-4  # keys are normalised with an epsilon


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (KDASpec(4, n_value_heads=6), "n_value_heads: 6 is no multiple of n_heads 4"),
        (KDASpec(4, n_value_heads=2), "n_value_heads: 2 is no multiple of n_heads 4"),
        (KDASpec(4, expand_v=0.3), "expand_v: 0.3 times head_dim 6 is 1.8, not a whole"),
        (KDASpec(4, conv=False, conv_bias=True), "conv_bias: there are no convolutions"),
        (KDASpec(4, gate_floor=-6.0), r"gate_floor: -6.0 is not in \[-5, 0\)"),
        (KDASpec(4, gate_floor=0.0), r"gate_floor: 0.0 is not in \[-5, 0\)"),
        (KDASpec(5), "n_heads: d_model 24 is not divisible by 5 heads"),
        (KDASpec(4, head_dim=0), "head_dim: 0 is not positive"),
        (KDASpec(0), "n_heads: 0 is not positive"),
        (KDASpec(4, norm_eps=0.0), "norm_eps: 0.0 is not positive"),
    ],
)
def test_broken_rules_are_named(spec, message):
    with pytest.raises(SpecError, match=message):
        spec.check(D_MODEL, "mixer")
