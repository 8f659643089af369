"""Layers as a registered family: a plain block is the member that needs no name."""

import pytest
import torch
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, LayerSpec, ModelSpec, Tokens, build_model, list_layers, load
from kizzasi.models.channels import MLPSpec
from kizzasi.models.layers import SharedSpec
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


def test_shared_weights_are_there_once_and_run_as_often_as_they_are_named(tmp_path):
    mamba = BlockSpec(MambaSpec(d_state=3), MLPSpec())
    blocks = (mamba, BLOCK, SharedSpec(layer=0), SharedSpec(layer=0))
    spec = ModelSpec(8, blocks, Tokens(7))
    plain = spec.replace(blocks=(mamba, BLOCK, mamba, mamba))
    model = build_model(spec, dtype=torch.float64)
    twin = build_model(plain, dtype=torch.float64)
    own = model.state_dict()
    copies = {name.replace("blocks.0.", f"blocks.{i}."): own[name] for name in own for i in (2, 3)}
    twin.load_state_dict({**copies, **own})
    x = torch.arange(12).view(2, 6) % 7
    assert_close(model(x).logits, twin(x).logits)
    out = model.step(x[:, 0], model.init_state(2))
    assert_close(out.logits, twin(x[:, :1]).logits[:, 0])
    ids = [each.generate(x, 4, temperature=0) for each in (model, twin)]
    assert torch.equal(*ids)
    assert len(list(model.parameters())) == len(own)
    mean = torch.autograd.grad(model(x).loss(x), model.blocks[0].mixer.A_log)[0]  # pyright: ignore
    each = torch.autograd.grad(twin(x).loss(x), [twin.blocks[i].mixer.A_log for i in (0, 2, 3)])  # pyright: ignore
    assert_close(mean, torch.stack(each).sum(0))
    model.float().save_pretrained(tmp_path / "model")
    assert torch.equal(load(tmp_path / "model")(x).logits, model(x).logits)
    assert spec.context_window == plain.context_window
    a, b = spec.cost(6, 2), plain.cost(6, 2)
    assert (a.flops, a.state_bytes) == (b.flops, b.state_bytes)
    assert a.params == model.n_params < b.params
    assert a.state_bytes == model(x).state.nbytes


def test_what_names_no_earlier_layer_is_refused():
    for blocks in ((SharedSpec(layer=0),), (BLOCK, SharedSpec(layer=0), SharedSpec(layer=1))):
        with pytest.raises(SpecError, match=r"layer: \d is no earlier layer with"):
            ModelSpec(8, blocks, Tokens(5)).check()
