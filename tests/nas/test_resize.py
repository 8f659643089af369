"""A model's twin: valid, about as large as wanted, of the same layers, with heads as wide."""

import math

import pytest

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model, presets
from kizzasi.models.channels import MLPSpec, SwiGLUSpec
from kizzasi.models.mixers import AttentionSpec, MambaSpec, ParallelSpec, RWKV4Spec, RWKV7Spec
from kizzasi.nas import Xorshift64, spaces
from kizzasi.nas.spaces.resize import resized


def kinds(spec: ModelSpec) -> list[tuple[str, str | None]]:
    return [(b.mixer.kind, b.channel and b.channel.kind) for b in spec.blocks]


@pytest.mark.parametrize("name", ["tiny", "hybrid", "mamba_rwkv", "moe"])
def test_every_ready_made_space_has_twins_of_half_the_size(name):
    rng, space = Xorshift64(5), getattr(spaces, name)()
    for _ in range(5):
        spec = space.sample(rng).spec
        size = spec.cost(1).params
        twin = resized(spec, size // 2)
        twin.check()
        assert abs(math.log2(2 * twin.cost(1).params / size)) <= 0.5
        assert twin.d_model < spec.d_model
        assert kinds(twin) == kinds(spec)
        assert twin.replace(d_model=1, blocks=()) == spec.replace(d_model=1, blocks=())


@pytest.mark.parametrize("family", presets.SMALL)
def test_a_preset_has_a_twin_that_runs(family):
    spec = presets.at_size(family, 60_000, vocab_size=256)
    twin = resized(spec, spec.cost(1).params // 2)
    assert 0.4 < twin.cost(1).params / spec.cost(1).params < 0.6
    model = build_model(twin)
    assert sum(p.numel() for p in model.parameters()) == twin.cost(1).params


def test_heads_keep_their_width_and_hidden_widths_their_share():
    attention = AttentionSpec(n_heads=8, n_kv_heads=4)
    blocks = (
        BlockSpec(attention, SwiGLUSpec(hidden=192)),
        BlockSpec(RWKV7Spec(head_dim=16), MLPSpec()),
        BlockSpec(ParallelSpec((RWKV4Spec(d_inner=96), MambaSpec(d_state=7))), None),
    )
    spec = ModelSpec(128, blocks, Tokens(256), tie_head=True)
    twin = resized(spec, spec.cost(1).params // 2)
    one, two, three = twin.blocks
    assert twin.d_model == 96  # six heads, 16 wide as before
    assert (one.mixer.n_heads, one.mixer.n_kv_heads, one.channel.hidden) == (6, 3, 144)
    assert (two.mixer, two.channel) == (RWKV7Spec(head_dim=16), MLPSpec())
    assert three.mixer.mixers == (RWKV4Spec(d_inner=72), MambaSpec(d_state=7))


def test_heads_bend_where_no_width_near_the_size_fits():
    spec = ModelSpec(24, (BlockSpec(RWKV7Spec(head_dim=24)),), Tokens(256), tie_head=True)
    twin = resized(spec, spec.cost(1).params // 2)
    assert twin.d_model % twin.blocks[0].mixer.head_dim == 0
    assert twin.blocks[0].mixer.head_dim < 24


def test_no_twin_is_named():
    mamba = ModelSpec(8, (BlockSpec(MambaSpec()),), Tokens(256), tie_head=True)
    with pytest.raises(SpecError, match="d_model: none below 8 makes about 10 parameters"):
        resized(mamba, 10)
    least = mamba.replace(d_model=1)
    with pytest.raises(SpecError, match=r"none below 1 .* none is valid"):
        resized(least, least.cost(1).params // 2)
