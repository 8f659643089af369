"""What a constructor hands out is initialised: models, blocks and mixers, of every kind."""

import math

import pytest
import torch
from cases import CAUSAL, CHANNELS, D_MODEL, MIXERS, every_kind, model_spec, tokens
from torch import nn

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, LayerContext, ModelSpec, SequenceModel, Tokens, build_model
from kizzasi.models.init import Ready
from kizzasi.models.layers.block import Block
from kizzasi.models.mixer import Mixer
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.mamba import Mamba, MambaSpec
from kizzasi.models.mixers.rwkv7 import RWKV7Spec

PARTS = {**MIXERS, **CHANNELS}


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(k == m and torch.equal(p, q) for (k, p), (m, q) in pairs)


@every_kind
def test_every_constructor_initialises_from_torchs_seed(name):
    spec = model_spec(name)
    for make in (
        lambda: SequenceModel(spec),
        lambda: Block(spec.blocks[0], LayerContext(D_MODEL, 1, 3)),
        lambda: PARTS[name].build(LayerContext(D_MODEL, 1, 3)),  # pyright: ignore[reportAttributeAccessIssue]
    ):
        torch.manual_seed(5)
        a, b = make(), make()
        torch.manual_seed(5)
        c = make()
        assert all(t.isfinite().all() for t in (*a.parameters(), *a.buffers()))
        assert same(a, c)
        assert not same(a, b)
    torch.manual_seed(5)
    assert same(SequenceModel(spec), build_model(spec, seed=5))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_seed_means_the_same_for_every_default_dtype(name, dtype):
    spec = model_spec(name)
    want = build_model(spec, seed=5)
    torch.manual_seed(5)
    torch.set_default_dtype(dtype)
    try:
        built, made = build_model(spec, seed=5), SequenceModel(spec)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(built, want)
    assert same(made, build_model(spec, seed=5, dtype=dtype))
    for key, value in made.state_dict().items():
        wide = want.state_dict()[key]
        assert value.dtype in (dtype, torch.float32) or not value.is_floating_point()
        assert torch.equal(value, wide.to(value.dtype)), key


@every_kind
def test_a_model_on_meta_is_initialised_after_it_got_memory(name):
    spec, made = model_spec(name), []
    with torch.device("meta"):
        made.append(SequenceModel(spec))
    made.append(build_model(spec, device="meta"))
    for model in made:
        assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
        model.to_empty(device="cpu")
        with torch.no_grad():
            for t in (*model.parameters(), *model.buffers()):
                t.fill_(math.nan if t.is_floating_point() else 77)
        model.reset_parameters(5)
        assert same(model, build_model(spec, seed=5))
        assert model(tokens(2, 5)).logits.isfinite().all()


def test_torchs_generator_is_left_alone_by_a_seed_and_by_meta():
    before = torch.get_rng_state()
    build_model(model_spec("mamba-small"), seed=3)
    with torch.device("meta"):
        SequenceModel(model_spec("mamba-small"))
    assert torch.equal(before, torch.get_rng_state())


def test_each_parameter_is_drawn_once(monkeypatch):
    """Composites and models do not initialise their parts a second time."""
    calls = []
    once = Mamba.reset_parameters
    monkeypatch.setattr(
        Mamba, "reset_parameters", lambda self, *args: (calls.append(self), once(self, *args))
    )
    spec = model_spec("parallel-sum")
    for make in (
        lambda: build_model(spec),
        lambda: SequenceModel(spec),
        lambda: MIXERS["parallel-sum"].build(LayerContext(D_MODEL)),  # pyright: ignore[reportAttributeAccessIssue]
    ):
        calls.clear()
        make()
        assert len(calls) == len(set(calls)) > 0


def test_what_is_left_unset_is_named():
    class Forgetful(nn.Module, metaclass=Ready):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.other = (nn.Parameter(torch.empty(3)) for _ in range(2))

        @classmethod
        def admit(cls) -> None: ...

        def start(self) -> None:
            nn.init.zeros_(self.weight)

    with pytest.raises(SpecError, match="Forgetful: its initialisation leaves other unset"):
        Forgetful()


def test_rules_are_applied_before_any_tensor():
    layer = LayerContext(30)
    for make, message in (
        (lambda: RWKV7Spec().build(layer), r"rwkv7\..*64"),
        (lambda: AttentionSpec(4).build(layer), r"attention\..*30"),
        (lambda: Block(BlockSpec(AttentionSpec(4)), layer), r"mixer\..*30"),
        (lambda: SequenceModel(ModelSpec(30, (BlockSpec(AttentionSpec(4)),), Tokens(5))), "30"),
        (lambda: MambaSpec().build(32), r"layer: expected a LayerContext.* spec.layer"),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(SpecError, match=message):
            make()


def test_every_mixer_is_of_the_type_that_initialises():
    assert isinstance(Mixer, Ready)
    assert set(CAUSAL) == set(PARTS)
