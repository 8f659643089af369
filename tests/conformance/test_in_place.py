"""Steps in place, for every causal mixer and channel: what one row of tokens decodes to, and that
whatever comes to act in the model acts there too."""

import pytest
import torch
from cases import VOCAB, causal_parts, make, tokens
from tolerance import assert_close
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kizzasi.models import BlockSpec, Decoder, ModelSpec, Tokens, build_model
from kizzasi.models.channels import MLPSpec, MoESpec, RWKVChannelSpec, SwiGLUSpec
from kizzasi.models.channels.moe_routers import TopK
from kizzasi.models.decoding.inplace.attention import PLACES
from kizzasi.models.decoding.inplace.base import Called
from kizzasi.models.decoding.inplace.line import CalledLine, InPlaceLine
from kizzasi.models.layers import LoopSpec
from kizzasi.models.mixers import (
    AttentionSpec,
    GatedDeltaSpec,
    GLASpec,
    KDASpec,
    Mamba2Spec,
    Mamba3Spec,
    MambaSpec,
    RetentionSpec,
    RGLRUSpec,
    RWKV4Spec,
    RWKV7Spec,
    ShortConvSpec,
)
from kizzasi.models.ops.activations import ACTIVATIONS
from kizzasi.models.ops.steps import STEPS
from kizzasi.testing.mixer import assert_same_state

native = pytest.mark.skipif(
    STEPS.resolve("auto", torch.device("cpu")) != "native",
    reason="no compiled kernels here: python -m kizzasi.models.ops.native.build",
)


def library():
    from kizzasi.models.ops.native import library

    return library


def follow(decoder, model, x, state):
    """Both along x (b, t), to the state after it."""
    for token in x.unbind(1):
        logits, state, *_ = model.step(token, state)
        assert_close(decoder.step(token), logits)
    return state


@causal_parts
@torch.no_grad()
def test_one_row_decodes_in_place_as_a_value_does(name):
    model, x = make(name), tokens(1, 16)
    begun = model(x[:, :3]).state
    decoder = Decoder(model, begun)
    state = follow(decoder, model, x[:, 3:], begun)
    assert isinstance(decoder._line, InPlaceLine)
    assert_same_state(decoder.fork(), state)
    assert torch.equal(decoder.fork().position, state.position)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        follow(decoder, model, x[:, :1], state)


def several(*blocks, **fields):
    spec = ModelSpec(16, blocks, Tokens(VOCAB), **fields)
    model = build_model(spec, seed=2, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():  # norms that do something, outputs that are not zero
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return model


LAYERS = {
    "sandwich": BlockSpec(
        AttentionSpec(2), SwiGLUSpec(), "rms_plus_one", norm_at="both", residual_scale=0.7
    ),
    "parallel": BlockSpec(
        AttentionSpec(4, n_kv_heads=2, window=3), MLPSpec(), "layer", parallel="shared"
    ),
    "separate": BlockSpec(
        Mamba2Spec(d_state=4, head_dim=8), MLPSpec(), "scale", parallel="separate"
    ),
    "bare": BlockSpec(MambaSpec(d_state=3), norm="layer_unbiased", stream_scale=1.3),
    "rwkv": BlockSpec(RWKV4Spec(), RWKVChannelSpec(version=4), norm_at="post"),
    "lfm2": BlockSpec(ShortConvSpec(), SwiGLUSpec()),
    "delta": BlockSpec(GatedDeltaSpec(n_heads=2), MLPSpec()),
    "gla": BlockSpec(GLASpec(n_heads=2, gate_normalizer=3.0), SwiGLUSpec()),
    "retention": BlockSpec(RetentionSpec(n_heads=2), SwiGLUSpec()),
    "trapezoid": BlockSpec(Mamba3Spec(d_state=6, head_dim=8), SwiGLUSpec()),
    "griffin": BlockSpec(RGLRUSpec(n_heads=2), SwiGLUSpec()),
    "goose": BlockSpec(RWKV7Spec(head_dim=8, value_residual=False), RWKVChannelSpec()),
    "goose 2": BlockSpec(RWKV7Spec(head_dim=4, bias=True), RWKVChannelSpec()),
}


@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_every_kind_of_layer_has_steps_of_its_own(rows):
    model = several(*LAYERS.values(), embed_norm=True, tie_head=True, logit_cap=3.0)
    x = tokens(rows, 9)
    begun = model(x[:, :2]).state
    decoder = Decoder(model, begun)
    state = follow(decoder, model, x[:, 2:], begun)
    assert_same_state(decoder.fork(), state)
    follow(Decoder(model), model, x, None)
    for block in decoder._line.blocks:
        assert not isinstance(block, Called)
        assert not isinstance(block.mixer, Called)
        assert not isinstance(block.channel, Called)


@pytest.mark.parametrize("order", ["gdg2", "g2", "dgg2", "g2d2", "rg2", "g", "dg"])
@torch.no_grad()
def test_a_first_value_reaches_the_layers_that_want_it(order):
    """Across layers in C, in place and called, whoever offers it."""
    goose, later, called = LAYERS["goose"], LAYERS["goose 2"], BlockSpec(KDASpec(n_heads=2))
    loop = LoopSpec((goose,), 2)
    layers = {"g": goose, "2": later, "d": called, "r": loop}
    model = several(*(layers[letter] for letter in order))
    x = tokens(1, 6)
    begun = model(x[:, :2]).state
    decoder = Decoder(model, begun)
    assert_same_state(decoder.fork(), begun)
    state = follow(decoder, model, x[:, 2:], begun)
    assert_same_state(decoder.fork(), state)


ATTENTION = {"n_heads": 4, "n_kv_heads": 2, "qkv_bias": True, "out_bias": True}
WRITTEN = {
    **LAYERS,
    "odd": BlockSpec(
        AttentionSpec(3, head_dim=10, rope_dims=6, qk_norm=True, qk_norm_kind="layer"),
        MLPSpec(hidden=7, activation="relu2", bias=True),
    ),
    "full": BlockSpec(
        AttentionSpec(**ATTENTION, qk_norm="full", position="none", n_global=2, window=4),
        SwiGLUSpec(hidden=5, bias=True, activation="gelu_tanh"),
    ),
    "jamba": BlockSpec(MambaSpec(d_state=9, inner_norm="rms", bias=True), MLPSpec(hidden=33)),
    "heads of keys": BlockSpec(
        GatedDeltaSpec(
            n_heads=6, n_key_heads=3, key_head_dim=5, value_head_dim=3, negative_eigenvalues=True
        )
    ),
    "deltanet": BlockSpec(GatedDeltaSpec(n_heads=2, gated=False)),
    "goose 3": BlockSpec(RWKV7Spec(head_dim=16, value_residual=False)),
    "all turn": BlockSpec(
        Mamba3Spec(
            d_state=9,
            head_dim=4,
            n_groups=2,
            rope_fraction=0.9,
            a_activation="heavy_tail",
            A_floor=0.5,
            out_norm=True,
        )
    ),
    "bias": BlockSpec(ShortConvSpec(d_conv=5, bias=True)),
    "falcon": BlockSpec(MambaSpec(inner_norm="weightless", conv_bias=False, d_conv=2)),
    "groups": BlockSpec(
        Mamba2Spec(d_state=3, head_dim=4, n_groups=2, dt_limit=(0.01, 0.1), d_conv=1)
    ),
    "ungated": BlockSpec(Mamba2Spec(d_state=16, head_dim=8, rms_norm=False, bias=True)),
    "norm-first": BlockSpec(
        Mamba2Spec(d_state=5, head_dim=8, n_groups=2, norm_before_gate=True, dt_limit=(0.02, None))
    ),
    "rwkv-wide": BlockSpec(RWKV4Spec(d_inner=21), RWKVChannelSpec(version=7, hidden=19)),
    "rwkv-6": BlockSpec(RWKV4Spec(), RWKVChannelSpec(version=6), parallel="shared"),
    **{
        f"mlp-{name}": BlockSpec(AttentionSpec(2), MLPSpec(hidden=11, activation=name))
        for name in ACTIVATIONS
    },
    "experts": BlockSpec(AttentionSpec(2), MoESpec(5, 3, hidden=9, router=TopK(scale=1.5))),
    "switch": BlockSpec(AttentionSpec(2), MoESpec(4, 1, normalize="all")),
}


def engines(decoder):
    return set(decoder._line.engines)


@native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", WRITTEN)
@torch.no_grad()
def test_layers_written_as_one_program_decode_as_called_ones_do(name, dtype):
    """On every instruction set, one row to four, and tables, rings and stores that are renewed."""
    model = several(WRITTEN[name], WRITTEN[name], tie_head=True).to(dtype)
    alone = isinstance(WRITTEN[name].channel, MoESpec)
    for isa, rows in zip(library().AVAILABLE, ((1, 3), (1, 4), (1, 2)), strict=False):
        with library().using(isa):
            for b in rows[:1] if alone else rows:
                x = tokens(b, 8)
                begun = model(x[:, :2]).state
                decoder = Decoder(model, begun)
                state = follow(decoder, model, x[:, 2:], begun)
                if dtype == torch.float64:
                    assert_same_state(decoder.fork(), state)
                assert engines(decoder) == {"native"}


@native
@pytest.mark.parametrize("name", ["sandwich", "full"])  # a store that grows, and a ring
@torch.no_grad()
def test_places_far_on_are_those_of_a_value(name):
    model, x = several(WRITTEN[name]), tokens(1, 2 * PLACES + 9)
    decoder = Decoder(model)
    state = follow(decoder, model, x, model.init_state(1))
    assert_same_state(decoder.fork(), state)


@native
@torch.no_grad()
def test_who_is_called_and_who_is_written():
    x = tokens(1, 5)
    for engine, found in (("auto", "native"), ("torch", "torch"), ("reference", "torch")):
        model = build_model(ModelSpec(16, (LAYERS["bare"],) * 2, Tokens(VOCAB)), engine=engine)
        decoder = Decoder(model, model(x).state)
        follow(decoder, model, x, model(x).state)
        assert engines(decoder) == {found}
        assert f"engine={found}" in repr(decoder)
    called = BlockSpec(AttentionSpec(2, softcap=5.0), MLPSpec())
    model = several(LAYERS["bare"], LAYERS["rwkv"], called, LAYERS["sandwich"])
    decoder = Decoder(model, model(x).state)
    follow(decoder, model, x, model(x).state)
    assert decoder._line.engines == ["native", "native", "torch", "native"]
    many = tokens(5, 4)
    decoder = Decoder(model, model(many).state)
    follow(decoder, model, many, model(many).state)
    assert engines(decoder) == {"torch"}
    with FlopCounterMode(display=False) as counter:
        decoder = Decoder(model, model(x).state)
        before = counter.get_total_flops()
        decoder.step(x[:, 0])
    assert counter.get_total_flops() - before >= 2 * sum(p.numel() for p in model.parameters()) / 2


@pytest.mark.parametrize("rows", [1, 5])  # one program, and calls
@torch.no_grad()
def test_weights_that_are_replaced_or_written_into_act_from_then_on(rows):
    model, x = several(LAYERS["bare"], LAYERS["sandwich"]), tokens(rows, 12)
    state = model(x[:, :2]).state
    decoder = Decoder(model, state)
    state = follow(decoder, model, x[:, 2:4], state)
    mixer = model.blocks[0].mixer
    mixer.A_log.add_(0.5)
    state = follow(decoder, model, x[:, 4:6], state)
    mixer.in_proj.weight = nn.Parameter(mixer.in_proj.weight.flip(0))
    state = follow(decoder, model, x[:, 6:8], state)
    model.blocks[1].mixer.o_proj.weight.data = -model.blocks[1].mixer.o_proj.weight.data
    state = follow(decoder, model, x[:, 8:10], state)
    model.load_state_dict({k: v + 0.01 for k, v in model.state_dict().items()})
    follow(decoder, model, x[:, 10:], state)


@torch.no_grad()
def test_what_comes_to_act_in_a_model_acts_in_place_too():
    model, x = several(*LAYERS.values()), tokens(1, 12)
    state = model(x[:, :2]).state
    decoder = Decoder(model, state)
    state = follow(decoder, model, x[:, 2:4], state)
    shift = torch.linspace(-1, 1, 16, dtype=torch.float64)
    before = model.step(x[:, 4], state).logits
    for part in (model.blocks[0].mixer.o_proj, model.blocks[2].channel, model.norm, model):
        seen = []
        hook = part.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        follow(Decoder(model, state), model, x[:, 4:5], state)
        follow(decoder, model, x[:, 4:5], state)  # which began without it
        assert len(seen) >= 4
        hook.remove()
        decoder = Decoder(model, state)
    model.blocks[0].mixer.o_proj = nn.Sequential(model.blocks[0].mixer.o_proj, Shift(shift))
    assert (model.step(x[:, 4], state).logits - before).abs().max() > 1e-3
    follow(Decoder(model, state), model, x[:, 4:], state)
    assert torch.equal(
        model.generate(x, 6, temperature=0),
        model.generate(x, 6, temperature=0, step=lambda *given: model.step(*given)),
    )


class Shift(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return x + self.by


class InPlaceOf(nn.Module):
    """What stands where a mixer stood, as adapters of parameters do: it has a forward, no more."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, *args, **kwargs):
        out = self.base(*args, **kwargs)
        return out._replace(y=2 * out.y)


@pytest.mark.parametrize("part", ["mixer", "channel"])
@torch.no_grad()
def test_what_stands_in_the_place_of_a_mixer_is_called(part):
    model = several(LAYERS["bare"], BlockSpec(MambaSpec(d_state=3), SwiGLUSpec()))
    begun = model(tokens(1, 3)).state
    plain = model.step(tokens(1, 1)[:, 0], begun).logits
    setattr(model.blocks[1], part, InPlaceOf(getattr(model.blocks[1], part)))
    decoder = Decoder(model, begun)
    follow(decoder, model, tokens(1, 9), begun)
    assert isinstance(decoder._line, InPlaceLine)
    assert not torch.equal(model.step(tokens(1, 1)[:, 0], begun).logits, plain)


@torch.no_grad()
def test_rules_and_listeners_may_write_and_hook():
    """Logits are no inference tensors, and a hook that a listener registers acts from then on."""
    model, x, seen = several(LAYERS["bare"]), tokens(1, 4), []

    def forbid(ids, logits):
        logits[:, 3].fill_(-torch.inf)
        return logits

    def listen(ids):
        if not seen:
            model.blocks[0].mixer.register_forward_hook(lambda *_: seen.append(0))
            seen.append(1)

    out = model.generate(x, 6, temperature=0, process=forbid, on_token=listen)
    assert 3 not in out[0, 4:].tolist()
    assert len(seen) == 1 + 5


@torch.no_grad()
def test_rounded_models_and_autocast_take_the_modules_way():
    model, x = several(LAYERS["sandwich"]), tokens(1, 4)
    decoder = Decoder(model, model(x).state)
    with torch.autocast("cpu", torch.bfloat16):
        decoder.step(x[:, 0])
        assert isinstance(decoder._line, CalledLine)
    assert isinstance(Decoder(model.bfloat16(), model(x).state)._line, CalledLine)
