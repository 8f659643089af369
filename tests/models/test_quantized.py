"""Weights in 4 or 8 bits, of any model: near full ones in both forms; adapters and hooks act."""

import copy

import pytest
import torch
from tolerance import assert_close

from kizzasi.errors import CheckpointError, SpecError
from kizzasi.models import (
    BlockSpec,
    Decoder,
    ModelSpec,
    Signal,
    Tokens,
    build_model,
    quantize_weights,
)
from kizzasi.models.channels import RWKVChannelSpec, SwiGLUSpec
from kizzasi.models.checkpoints.quantized import QuantizedLinear, levels
from kizzasi.models.decoding.inplace.line import InPlaceLine
from kizzasi.models.mixers import AttentionSpec, MambaSpec, RWKV4Spec
from kizzasi.models.ops.packed import PACKED_LINEAR, pack, unpack
from kizzasi.models.parts.linear import is_plain

native = pytest.mark.skipif(
    PACKED_LINEAR.resolve("auto", torch.device("cpu")) != "native",
    reason="no compiled kernels here: python -m kizzasi.models.ops.native.build",
)

BLOCKS = (
    BlockSpec(AttentionSpec(4, n_kv_heads=2), SwiGLUSpec(hidden=64)),
    BlockSpec(MambaSpec(d_state=7, dt_rank=2)),
    BlockSpec(RWKV4Spec(), RWKVChannelSpec(version=4)),
)


def model_of(stem=None, **fields):
    model = build_model(ModelSpec(32, BLOCKS, stem or Tokens(48), **fields), seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    return model


def ids(*shape):
    return torch.randint(48, shape, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=["auto", "torch"])
def engine(request, monkeypatch):
    """With kernels, where there are any, and without."""
    if request.param == "torch":
        monkeypatch.setattr(PACKED_LINEAR, "resolve", lambda *_: "torch")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.usefixtures("engine")
@torch.no_grad()
def test_rounded_models_are_near_and_decode_as_they_read(tied):
    model, x = model_of(tie_head=tied), ids(1, 9)
    full, off = model(x).logits, {}
    for bits in (4, 8):
        small = copy.deepcopy(model)
        quantize_weights(small, bits)
        assert not any(is_plain(m) for m in small.blocks.modules())
        assert sum(isinstance(m, QuantizedLinear) for m in small.modules()) == 18
        logits = small(x).logits
        off[bits] = float((logits - full).norm() / full.norm())
        decoder = Decoder(small, small(x[:, :4]).state)
        assert isinstance(decoder._line, InPlaceLine)
        stepped = torch.stack([decoder.step(token) for token in x[:, 4:].unbind(1)], 1)
        assert (stepped - logits[:, 4:]).norm() < 0.05 * logits.norm()
        assert small.generate(x, 3, temperature=0).shape == (1, 12)
        with pytest.raises(CheckpointError, match="not saved"):
            small.state_dict()
    assert off[8] < 0.02
    assert off[8] < off[4] < 0.3


@torch.no_grad()
def test_hooks_and_adapters_act_on_rounded_layers():
    peft = pytest.importorskip("peft")
    model, x, seen = model_of(), ids(1, 5), []
    layer = model.blocks[0].mixer.o_proj
    layer.register_forward_hook(lambda _, __, y: (seen.append(1), 2 * y)[1])
    steered = model(x).logits
    quantize_weights(model)
    assert (model(x).logits - steered).norm() < 0.03 * steered.norm()
    model.generate(x, 3, temperature=0)
    assert len(seen) == 2 + 3
    other = model_of()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(other, config)
    full = adapted(x).logits
    quantize_weights(other)
    assert isinstance(other.blocks[0].mixer.q_proj.base_layer, QuantizedLinear)
    assert (adapted(x).logits - full).norm() < 0.03 * full.norm()
    with adapted.disable_adapter():
        assert (adapted(x).logits - full).norm() > 0.05 * full.norm()


@native
@pytest.mark.parametrize("bits", [4, 8])
def test_products_in_c_are_those_of_the_weights_that_the_levels_stand_for(bits):
    from kizzasi.models.ops.native import library

    draw = torch.Generator().manual_seed(0)
    for isa in library.AVAILABLE:
        with library.using(isa):
            for rows in (1, 3, 4, 6, 40):
                w, x, bias = (torch.randn(s, generator=draw) for s in ((50, 96), (rows, 96), (50,)))
                weight = pack(*levels(w, bits))
                run = PACKED_LINEAR.pick("native", x.device)
                assert weight.codes.shape[2] == 4 * bits
                wide = unpack(weight).double()
                assert_close(run(x, weight, bias).double(), x.double() @ wide.T + bias, x.dtype)
                assert_close(run(x.mT.contiguous().mT, weight), run(x, weight))


@native
@torch.no_grad()
def test_levels_are_read_by_the_program_of_a_decoder():
    model, x = model_of(), ids(1, 12)
    quantize_weights(model)
    decoder, state = Decoder(model, model(x[:, :2]).state), model(x[:, :2]).state
    assert set(decoder._line.engines) == {"native"}
    for token in x[:, 2:].unbind(1):
        logits, state, *_ = model.step(token, state)
        assert_close(decoder.step(token), logits)
    wide = model.double()
    decoder = Decoder(wide, wide(x).state)
    assert set(decoder._line.engines) == {"torch"}


def test_levels_are_the_nearest_and_ends_are_exact():
    w = torch.randn(16, 64)
    for bits in (4, 8):
        level, scale, minimum = levels(w, bits)
        again = (level.float() * scale + minimum).flatten(1)
        step = scale.expand(-1, -1, 32).flatten(1)
        assert ((again - w).abs() <= 0.5001 * step).all()
    assert torch.equal(
        levels(torch.full((16, 32), 0.5), 8).minimum.float(), torch.full((16, 1, 1), 0.5)
    )


def test_what_cannot_be_rounded_is_said_or_left():
    signal = model_of(Signal(3, 3))
    quantize_weights(signal)
    assert is_plain(signal.stem.out_proj)
    with pytest.raises(SpecError, match="choose 4 or 8"):
        quantize_weights(signal, 5)  # pyright: ignore[reportArgumentType]
