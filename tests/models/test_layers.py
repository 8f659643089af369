"""Layers as a registered family: a plain block is the member that needs no name."""

import pytest

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, LayerSpec, ModelSpec, Tokens, list_layers
from kizzasi.models.channels import MLPSpec
from kizzasi.models.layers.layer import window_of
from kizzasi.models.mixers import AttentionSpec, MambaSpec

BLOCK = BlockSpec(AttentionSpec(2), MLPSpec())


def test_a_block_is_written_without_a_kind_and_read_with_or_without():
    data = BLOCK.to_dict()
    assert "kind" not in data
    assert LayerSpec.from_dict(data) == LayerSpec.from_dict({**data, "kind": "block"}) == BLOCK
    assert "block" in list_layers()


def test_unknown_layers_and_parts_in_their_place_are_refused():
    data = {"d_model": 8, "blocks": [BLOCK.to_dict()] * 2, "stem": {"kind": "tokens"}}
    data["blocks"][1] = {"kind": "lop", "mixer": {}}
    with pytest.raises(SpecError, match=r"blocks\[1\]\.kind: 'lop' unknown"):
        ModelSpec.from_dict(data)
    with pytest.raises(SpecError, match=r"wrap it: BlockSpec\(MambaSpec"):
        ModelSpec(8, (MambaSpec(),), Tokens(5))  # pyright: ignore[reportArgumentType]
    with pytest.raises(SpecError, match=r"blocks\[0\]\.mixer: 'block' is a whole layer"):
        ModelSpec(8, (BlockSpec(BLOCK),), Tokens(5)).check()  # pyright: ignore[reportArgumentType]
    with pytest.raises(SpecError, match=r"blocks\[0\]: expected a layer"):
        ModelSpec(8, (Tokens(5),), Tokens(5)).check()  # pyright: ignore[reportArgumentType]


def test_what_a_layer_holds_is_found_from_its_fields():
    assert [path for path, _ in BLOCK.parts("blocks[0]")] == [
        "blocks[0].mixer",
        "blocks[0].channel",
    ]
    assert [name for name, _ in BlockSpec(MambaSpec()).inside()] == ["mixer"]
    near = BlockSpec(AttentionSpec(2, window=5), MLPSpec())
    assert window_of((near, near)) == 9
    assert window_of((near,), times=3) == 13
