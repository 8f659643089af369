"""Layers as a registered family: a plain block is the member that needs no name."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, LayerSpec, ModelSpec, Tokens, build_model, list_layers, load
from kizzasi.models.call import Call
from kizzasi.models.channels import MLPSpec
from kizzasi.models.layers import LoopSpec, SharedSpec
from kizzasi.models.layers.block import Block
from kizzasi.models.layers.layer import window_of
from kizzasi.models.mixers import AttentionSpec, MambaSpec, ParallelSpec

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


def heads(**fields):
    return BlockSpec(AttentionSpec(2, **fields))


def test_a_reader_holds_no_keys_and_does_what_equal_weights_would():
    own, lent = (heads(), heads()), (heads(), heads(kv_from=0))
    plain, spec = (ModelSpec(8, blocks, Tokens(7)) for blocks in (own, lent))
    model, twin = (build_model(s, dtype=torch.float64) for s in (spec, plain))
    assert {name for name in twin.state_dict() if name not in model.state_dict()} == {
        f"blocks.1.mixer.{part}_proj.weight" for part in "kv"
    }
    twin.load_state_dict(model.state_dict(), strict=False)
    x = torch.arange(12).view(2, 6) % 7
    first, second = (layer for layer in twin.blocks.layers if isinstance(layer, Block))
    u = twin.stem.embed(x, torch.arange(6).expand(2, -1))
    y = first(u).y  # the second layer's keys and values are the first's
    kv, qs = (
        layer.mixer._project(layer.mixer_norm(z), torch.arange(6)[None], "", Call.of(z))  # pyright: ignore
        for layer, z in ((first, u), (second, y))
    )
    q, k, v = qs[0], *kv[1:3]
    z = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
    y = y + second.mixer.o_proj(z)  # pyright: ignore
    out = model(x)
    assert_close(out.logits, model._own_head(model.norm(y)))
    assert out.state.blocks[1].mixer == ()
    a, b = spec.cost(6, 2), plain.cost(6, 2)
    assert a.state_bytes == out.state.nbytes // 2 + 16 < b.state_bytes
    assert b.params - a.params == 2 * 8 * 8
    ids = model.generate(x, 4, temperature=0)
    assert torch.equal(ids[:, -1], model(ids[:, :-1]).logits[:, -1].argmax(-1))


def test_sources_that_do_not_fit_are_refused():
    wide = BlockSpec(ParallelSpec((AttentionSpec(2), AttentionSpec(2, kv_from=0))))
    for blocks, message in (
        ((heads(kv_from=0),), r"blocks\[0\]\.mixer\.kv_from: 0 is no earlier layer"),
        ((heads(), heads(kv_from=1)), r"kv_from: 1 is no earlier layer of these; .* from 0 to 0"),
        ((heads(), heads(memory_from=-1)), "memory_from: -1 is no earlier layer"),
        ((BlockSpec(MambaSpec()), heads(kv_from=0)), r"blocks\[0\] has no keys and values"),
        ((heads(), heads(kv_from=0), heads(kv_from=1)), r"blocks\[1\] has no keys and values"),
        ((heads(), heads(kv_from=0, window=3)), r"differ \{'window': \(None, 3\)\}"),
        ((heads(), heads(kv_from=0, rope_theta=5e5)), r"differ \{'rope_theta'"),
        ((heads(), heads(kv_from=0, value_glu=True)), "kv_from: keys and values come from else"),
        ((heads(), heads(kv_from=0, memory_from=0)), "memory_from: .* made of nothing"),
        ((heads(), wide), r"blocks\[1\]\.mixer: \{'kv': 0\} names other layers"),
        (
            (heads(), LoopSpec(body=(heads(kv_from=0),), n_loops=2)),
            r"blocks\[1\]\.body\[0\]\.mixer\.kv_from: 0 is no earlier layer",
        ),
    ):
        with pytest.raises(SpecError, match=message):
            ModelSpec(8, blocks, Tokens(5)).check()
    with pytest.raises(SpecError, match="attention: reads other layers"):
        AttentionSpec(2, kv_from=0).layer(8)


def test_a_lent_layer_is_recomputed_and_compiled():
    blocks = (heads(), heads(kv_from=0), heads(memory_from=0), SharedSpec(layer=0))
    model = build_model(ModelSpec(8, blocks, Tokens(7)), dtype=torch.float64)
    x, parameters = torch.arange(12).view(2, 6) % 7, list(model.parameters())
    given = torch.autograd.grad(model(x).loss(x), parameters)
    model.recompute = True
    for a, b in zip(torch.autograd.grad(model(x).loss(x), parameters), given, strict=True):
        assert_close(a, b)
    model.recompute = False
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    assert_close(compiled(x).logits, model(x).logits)
