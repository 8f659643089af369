"""Latent attention: the small cache, absorbed steps, and the same layer of transformers."""

import pytest
import torch
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models.attention.rope_scaling import RopeScaling
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers.mla import MLASpec
from kizzasi.models.ops.attention import attention, attention_ref

D_MODEL, T = 24, 20
SIZES = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
YARN = RopeScaling("yarn", 8.0, 16, attention_factor=1.0)
SPECS = {
    "direct": MLASpec(4, **SIZES),
    "q-latent": MLASpec(4, **SIZES, q_lora_rank=8),
    "yarn": MLASpec(2, **SIZES, q_lora_rank=8, rope_scaling=YARN, scale=0.5),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def build(spec):
    mixer = spec.build(LayerContext(D_MODEL)).double()
    mixer.reset_parameters(2, torch.Generator().manual_seed(0))
    return mixer


def signal(b, t, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, t, D_MODEL, generator=generator, dtype=torch.float64)


def fold(mixer, x, state=None):
    state = mixer.init_state(x.shape[0], x.device, x.dtype) if state is None else state
    ys = []
    for i in range(x.shape[1]):
        out = mixer.step(x[:, i], state)
        ys.append(out.y)
        state = out.state
    return torch.stack(ys, 1), state


@every_spec
@pytest.mark.parametrize("length", [1, 2, 7, 65])
def test_absorbed_steps_equal_written_out_keys_and_values(spec, length):
    mixer, x = build(spec), signal(2, length).requires_grad_()
    weight = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
    results = []
    for y, state in ((out := mixer(x)).y, out.state), fold(mixer, x):
        grads = torch.autograd.grad((y * weight).sum(), (x, *mixer.parameters()))
        results.append((y, state.k, state.v, *grads))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


@every_spec
def test_the_cache_holds_one_latent_and_one_rotary_key(spec):
    mixer, x = build(spec), signal(2, 9)
    state = mixer(x).state
    assert state.k.shape == (2, 1, 9, SIZES["qk_rope_head_dim"])
    assert state.v.shape == (2, 1, 9, SIZES["kv_lora_rank"])
    layer = LayerContext(D_MODEL)
    floats = 2 * 9 * (SIZES["qk_rope_head_dim"] + SIZES["kv_lora_rank"])
    assert spec.cost(layer, 9, 2).state_bytes == 4 * floats
    many = MLASpec(16, **SIZES)
    assert many.cost(layer, 9, 2).state_bytes == spec.cost(layer, 9, 2).state_bytes


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_of_unequal_widths_lengths_and_own_scale(masked, causal, bias):
    q, k, v = (torch.randn(2, h, n, d).double() for h, n, d in ((4, 5, 7), (2, 9, 7), (2, 9, 3)))
    visible = torch.rand(2, 1, 5, 9) < 0.5 if masked else None
    if visible is not None:
        visible[..., 0] = True
    options = {
        "visible": visible,
        "causal": causal,
        "scale": 0.3,
        "bias": torch.randn(4, 5, 9).double() if bias else None,
    }
    assert_close(attention(q, k, v, **options), attention_ref(q, k, v, **options))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_rope_head_dim": 3}, r"m.qk_rope_head_dim: 3 entries .* give an even number"),
        ({"kv_lora_rank": 0}, r"m.kv_lora_rank: 0 is not positive"),
        ({"q_lora_rank": 0}, r"m.q_lora_rank: 0 is not positive"),
        ({"scale": -1.0}, r"m.scale: -1.0 is not positive"),
        ({"rope_theta": 1.0}, r"m.rope_theta: 1.0 is not above 1"),
        ({"rope_scaling": RopeScaling("linear", 0.5)}, r"m.rope_scaling.factor: 0.5 is below 1"),
    ],
)
def test_check_names_the_rule_and_the_remedy(changes, message):
    with pytest.raises(SpecError, match=message):
        MLASpec(4, **{**SIZES, **changes}).check(D_MODEL, "m")


@pytest.mark.parametrize("q_lora_rank", [None, 8])
@pytest.mark.parametrize("yarn", [False, True])
@torch.no_grad()
def test_parity_with_deepseek_v3(q_lora_rank, yarn):
    """float64, prefill and decoding. Their norms and rotary tables are float32, so the test gives
    the layer torch's norm, and tables of the same frequencies in float64."""
    pytest.importorskip("transformers", reason="parity with transformers: it is not installed")
    from transformers import DeepseekV3Config, DynamicCache
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    rope = {"rope_theta": 500.0, "rope_type": "default"}
    if yarn:
        theirs = {"factor": 8.0, "original_max_position_embeddings": 16}
        rope |= {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0, **theirs}
    config = DeepseekV3Config(
        hidden_size=D_MODEL,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_hidden_layers=1,
        max_position_embeddings=128,
        q_lora_rank=q_lora_rank,
        rope_parameters=rope,
        **SIZES,
    )
    config._attn_implementation = "sdpa"  # their eager softmax is float32
    layer = DeepseekV3Attention(config, layer_idx=0).eval()
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        if getattr(layer, name) is not None:
            width = getattr(layer, name).weight.numel()
            setattr(layer, name, torch.nn.RMSNorm(width, eps=1e-6))
    layer.double()
    for p in layer.parameters():
        p.normal_(0, 0.4)
    spec = MLASpec(
        4,
        **SIZES,
        q_lora_rank=q_lora_rank,
        rope_theta=500.0,
        rope_scaling=YARN if yarn else None,
        scale=layer.scaling,
    )
    ours = build(spec)
    ours.load_state_dict(layer.state_dict())
    assert spec.scale == pytest.approx(10**-0.5 * (1.2079 if yarn else 1.0) ** 2, rel=1e-4)

    position = torch.arange(T)
    frequencies = ours.rotary.scaling.frequencies(
        4, 500.0, device=torch.device("cpu"), dtype=torch.float64
    )
    angle = (position[:, None] * frequencies).repeat(1, 2).expand(2, -1, -1)
    cos, sin = angle.cos(), angle.sin()
    x, cut = signal(2, T), 13
    mask = torch.full((1, 1, cut, cut), -1e300, dtype=torch.float64).triu(1)
    cache = DynamicCache()
    first = layer(x[:, :cut], (cos[:, :cut], sin[:, :cut]), mask, cache)[0]
    out = ours(x[:, :cut])
    assert_close(out.y, first)
    state = out.state
    for t in range(cut, T):
        now = slice(t, t + 1)
        expected = layer(x[:, now], (cos[:, now], sin[:, now]), None, cache)[0]
        stepped = ours.step(x[:, t], state)
        state = stepped.state
        assert_close(stepped.y, expected[:, 0])
