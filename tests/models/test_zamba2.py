"""Zamba2 against transformers: equal logits both ways, equal bytes after a round trip."""

import copy

import pytest
import torch
from test_foreign_mamba import assert_round_trip, difference, edit, hold_to_float64, make_peer
from tolerance import assert_close

from kizzasi.errors import CheckpointError, SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model, load
from kizzasi.models.channels import MLPSpec
from kizzasi.models.checkpoints import save
from kizzasi.models.layers import AsideSpec
from kizzasi.models.mixers import Mamba2Spec, MambaSpec

SMALL = {
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "layers_block_type": ["linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid"],
    "n_mamba_heads": 4,
    "mamba_d_state": 4,
    "adapter_rank": 3,
    "chunk_size": 4,
    # transformers bounds the steps of a prompt by it, and of a token after the prompt does not
    "time_step_min": 1e-30,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
CASES = {
    "one block": {},
    "two blocks, rope, adapted heads": {
        "num_mem_blocks": 2,
        "use_mem_rope": True,
        "use_shared_attention_adapter": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "biased, grouped, tanh": {
        "num_mem_blocks": 3,
        "add_bias_linear": True,
        "mamba_ngroups": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-3,
    },
}


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zamba2") / "theirs"
    return make_peer("zamba2", SMALL | CASES[request.param], folder), folder


def test_logits_of_prefill_and_of_cached_decoding(made):
    peer, folder = made
    assert difference(peer, load(folder)) <= 1e-4


@pytest.mark.parametrize("case", CASES)
def test_logits_in_float64(case, tmp_path, monkeypatch):
    hold_to_float64(monkeypatch)
    peer = make_peer("zamba2", SMALL | CASES[case], tmp_path, torch.float64)
    rotary = getattr(peer.model, "rotary_emb", None)
    if rotary is not None:  # made in float32
        rotary.inv_freq = 500.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    assert difference(peer, load(tmp_path)) <= 1e-9


def test_read_and_write_gives_the_same_file_and_the_same_logits(made, tmp_path):
    peer, folder = made
    assert_round_trip(peer, folder, tmp_path, "zamba2")


def test_the_smallest_step_holds_in_both_forms(tmp_path):
    """transformers forgets it in cached decoding; a prompt and its steps are one sequence here."""
    peer = make_peer("zamba2", SMALL | {"time_step_min": 0.3}, tmp_path)
    model, ids = load(tmp_path), torch.arange(12)[None]
    whole = model(ids).logits
    assert (whole - peer(ids).logits).abs().max() <= 1e-4
    out = model(ids[:, :5])
    for t in range(5, 12):
        out = model.step(ids[:, t], out.state)
        assert (out.logits - whole[:, t]).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_block_type": ["hybrid", "attention"] * 2 + ["mamba"]}, "layers_block_type: "),
        ({"hybrid_layer_ids": [0]}, r"hybrid_layer_ids: \[0\] is not supported"),
        ({"num_mem_blocks": 0}, "num_mem_blocks: 0 is not positive"),
        ({"n_mamba_heads": 5}, "n_mamba_heads: 5 does not divide 32 channels"),
        ({"num_key_value_heads": 2}, "num_key_value_heads: 2 is not supported"),
        ({"use_long_context": True}, "use_long_context: True is not supported"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: False is not supported"),
        ({"hidden_act": "relu"}, "hidden_act: 'relu' is not supported"),
        ({"adapter_ranks": 2}, "adapter_ranks: 2 is unknown here"),
    ],
)
def test_refused_configs(changes, message, tmp_path):
    make_peer("zamba2", SMALL, tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load(edit(tmp_path, **changes))


MAMBA2 = Mamba2Spec(d_state=4, head_dim=8)
ASIDE = AsideSpec(mixer=MAMBA2, n_heads=2, hidden=6, adapter_rank=2)


def model_of(*blocks):
    return build_model(ModelSpec(16, blocks, Tokens(19), tie_head=True))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ((BlockSpec(MAMBA2),), "no layer is of the kind 'aside'"),
        ((AsideSpec(mixer=MambaSpec(), n_heads=2, hidden=6),), "mamba, and it has mamba2 only"),
        ((BlockSpec(MambaSpec()), ASIDE), "no name for blocks.0.mixer.*|blocks"),
        ((ASIDE, BlockSpec(MAMBA2, MLPSpec())), "no name for blocks.1.channel"),
        ((ASIDE, AsideSpec(mixer=MAMBA2, n_heads=4, hidden=6, adapter_rank=2)), r"blocks\[1\]"),
    ],
)
def test_what_the_format_cannot_say_is_refused(blocks, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        save(model_of(*blocks), tmp_path, "zamba2")


def test_a_block_in_several_layers_is_one():
    again = AsideSpec(mixer=MambaSpec(d_state=2), n_heads=2, hidden=6, adapter_rank=2, layer=0)
    model = model_of(ASIDE, again, again)
    names = [name for name in model.state_dict() if ".block." in name]
    assert names
    assert all(name.startswith("blocks.0.block.") for name in names)
    own, one, other = model.blocks
    assert one.runs == other.runs == (own.block,)
    twin = copy.deepcopy(model)
    assert twin.blocks[1].runs == (twin.blocks[0].block,)
    assert twin.blocks[0].block is not own.block
    x = torch.arange(6)[None]
    with torch.no_grad():
        twin.blocks[0].block.o_proj.weight.zero_()
    assert not torch.equal(twin(x).logits, model(x).logits)
    model(x).logits.sum().backward()
    assert own.block.q_proj.weight.grad is not None


def test_the_block_reads_the_first_stream_and_recomputation_keeps_it():
    model = model_of(BlockSpec(MambaSpec(d_state=2)), ASIDE).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    x, grads = torch.arange(6)[None], []
    for recompute in (False, True):
        model.zero_grad()
        model.blocks.train()
        h = model.stem.embedding(x)
        out = model.blocks(h, None, call_of(h), recompute=recompute)
        out.x.square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.blocks.named_parameters()})
    for name, grad in grads[0].items():
        assert_close(grad, grads[1][name], msg=name)


def call_of(x):
    from kizzasi.models.call import Call

    return Call.of(x)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ((ASIDE, AsideSpec(mixer=MAMBA2, n_heads=2, hidden=6, layer=0)), "the block of layer 0 is"),
        ((AsideSpec(mixer=MAMBA2, n_heads=2, hidden=6, layer=0),), "layer: 0 is no earlier layer"),
        ((BlockSpec(MAMBA2), AsideSpec(mixer=MAMBA2, n_heads=2, hidden=6, layer=0)), "0 is no ea"),
        ((AsideSpec(mixer=MAMBA2, n_heads=3, hidden=6),), "n_heads: 3 does not divide 2 d_model"),
        ((AsideSpec(mixer=MAMBA2, n_heads=2, hidden=0),), "hidden: 0 is not positive"),
        ((AsideSpec(mixer=Mamba2Spec(head_dim=7), n_heads=2, hidden=6),), r"blocks\[0\]\.mixer\."),
    ],
)
def test_broken_rules_are_named(blocks, message):
    with pytest.raises(SpecError, match=message):
        ModelSpec(16, blocks, Tokens(19)).check()
