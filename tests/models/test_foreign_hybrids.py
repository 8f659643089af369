"""Jamba, Bamba and Qwen3-Next against transformers: equal logits both ways, equal bytes."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_foreign_mamba import (
    assert_round_trip,
    difference,
    edit,
    hold_to_float64,
    make_peer,
    transformers,
)

from kizzasi.errors import CheckpointError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model, load
from kizzasi.models.channels import SwiGLUSpec
from kizzasi.models.channels.moe import MoESpec
from kizzasi.models.checkpoints import save
from kizzasi.models.mixers import AttentionSpec, GatedDeltaSpec, Mamba2Spec, MambaSpec

TRUNK = {
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
JAMBA = {
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 3,
    "mamba_d_state": 4,
}
BAMBA = {
    "attn_layer_indices": [1, 3],
    "mamba_n_heads": 4,
    "mamba_d_state": 4,
    "mamba_chunk_size": 4,
}
QWEN = {
    "rms_norm_eps": 1e-4,  # with 1e-6, norms of small heads make 2e-4 of float32's rounding
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 10,
    "num_experts": 3,
    "num_experts_per_tok": 2,
}
CASES = {
    "jamba": JAMBA,
    "jamba dense, biased": JAMBA
    | {
        "num_experts": 1,
        "mamba_proj_bias": True,
        "mamba_conv_bias": False,
        "mamba_dt_rank": 3,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-3,
    },
    "bamba": BAMBA,
    "bamba biased, grouped": BAMBA
    | {
        "mamba_n_groups": 2,
        "mamba_proj_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "qwen3_next": QWEN,
    "qwen3_next biased, dense": QWEN
    | {
        "attention_bias": True,
        "norm_topk_prob": False,
        "mlp_only_layers": [0, 3],
        "layer_types": ["full_attention", "linear_attention"] * 2,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-3,
        "tie_word_embeddings": True,
    },
}


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    folder, kind = tmp_path_factory.mktemp("hybrid") / "theirs", request.param.split()[0]
    return make_peer(kind, TRUNK | CASES[request.param], folder), folder, kind


def test_logits_of_prefill_and_of_cached_decoding(made):
    peer, folder, _ = made
    assert difference(peer, load(folder)) <= 1e-4


@pytest.mark.parametrize("case", CASES)
def test_logits_in_float64(case, tmp_path, monkeypatch):
    hold_to_float64(monkeypatch)
    peer = make_peer(case.split()[0], TRUNK | CASES[case], tmp_path, torch.float64)
    rotary = getattr(peer.model, "rotary_emb", None)
    if rotary is not None:  # made in float32
        n, theta = 2 * len(rotary.inv_freq), peer.config.rope_parameters["rope_theta"]
        rotary.inv_freq = theta ** -(torch.arange(0, n, 2, dtype=torch.float64) / n)
    assert difference(peer, load(tmp_path)) <= 1e-9


def test_read_and_write_gives_the_same_file_and_the_same_logits(made, tmp_path):
    peer, folder, kind = made
    assert_round_trip(peer, folder, tmp_path, kind)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder per model_type, made once."""
    root = tmp_path_factory.mktemp("stored")
    for kind in ("jamba", "bamba", "qwen3_next"):
        make_peer(kind, TRUNK | CASES[kind], root / kind)
    return root


@pytest.mark.parametrize("kind", ["jamba", "qwen3_next"])
def test_experts_stacked_as_in_memory_are_read_too(kind, tmp_path):
    peer = make_peer(kind, TRUNK | CASES[kind], tmp_path)
    stacked = {name: t.clone() for name, t in peer.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in stacked)
    save_file(stacked, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert difference(peer, load(tmp_path)) <= 1e-4


@pytest.mark.parametrize("kind", ["jamba", "bamba", "qwen3_next"])
def test_bfloat16_files_come_back_byte_for_byte(kind, tmp_path):
    """Though decays, step sizes and norms are float32 in our bfloat16 models."""
    make_peer(kind, TRUNK | CASES[kind], tmp_path / "theirs", torch.bfloat16)
    model = load(tmp_path / "theirs")
    assert model.stem.embedding.weight.dtype == torch.bfloat16
    assert any("A_log" in n and p.dtype == torch.float32 for n, p in model.named_parameters())
    save(model, tmp_path / "again", kind)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("theirs", "again")]
    assert files[0] == files[1]


def test_keys_and_tensors_of_published_files(stored, tmp_path):
    """As in Jamba-v0.1, Bamba-9B and Qwen3-Next-80B, of transformers 4."""
    published = {
        "jamba": {
            "mamba_inner_layernorms": True,
            "calc_logits_for_entire_prompt": False,
            "num_logits_to_keep": 1,
            "n_ctx": 64,
            "mamba_dt_rank": "auto",
            "use_mamba_kernels": True,
        },
        "bamba": {
            "attn_rotary_emb": 2,
            "mamba_d_head": "auto",
            "rope_parameters": None,
            "rope_theta": 10000.0,
            "time_step_limit": None,
        },
        "qwen3_next": {
            "layer_types": None,
            "full_attention_interval": 4,
            "rope_parameters": None,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
    }
    for kind, keys in published.items():
        shutil.copytree(stored / kind, tmp_path / kind)
        spec = load(tmp_path / kind).spec
        assert load(edit(tmp_path / kind, **keys)).spec == spec, kind
    path = tmp_path / "qwen3_next" / "model.safetensors"
    draft = {
        "mtp.fc.weight": torch.ones(2, 2),
        "mtp.layers.0.mlp.experts.1.up_proj.weight": torch.ones(1),
    }
    save_file(load_file(path) | draft, path)
    load(tmp_path / "qwen3_next")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("jamba", {"attn_layer_offset": 3}, "attn_layer_offset: 3 is outside a period of 3"),
        ("jamba", {"mamba_inner_layernorms": False}, "mamba_inner_layernorms: False"),
        ("jamba", {"sliding_window": 4}, "sliding_window: 4 is not supported"),
        ("jamba", {"rope_theta": 1e4}, "rope_theta: 10000.0 is unknown here"),
        ("jamba", {"expert_layer_offset": 0}, "does not fit its config"),
        ("bamba", {"attn_layer_indices": [4]}, r"attn_layer_indices: \[4\] for 4 layers"),
        ("bamba", {"attn_rotary_emb": 4}, "attn_rotary_emb: 4 is not supported; only 2"),
        ("bamba", {"layer_types": ["full_attention"] * 4}, "layer_types: .* attn_layer_indices"),
        ("bamba", {"mamba_n_heads": 5}, "mamba_n_heads: 5 does not divide 32 channels"),
        ("bamba", {"mamba_d_head": 4}, "mamba_d_head: 4 is not supported; only 8, 'auto'"),
        ("qwen3_next", {"layer_types": ["sliding_attention"] * 4}, "layer_types: .* are not 4 of"),
        ("qwen3_next", {"layer_types": None, "full_attention_interval": 0}, "interval: 0 is below"),
        ("qwen3_next", {"decoder_sparse_step": 5}, "leave no mixture of experts"),
        ("qwen3_next", {"linear_num_key_heads": 3}, "n_key_heads: 3 does not divide"),
    ],
)
def test_refused_configs(kind, changes, message, stored, tmp_path):
    folder = shutil.copytree(stored / kind, tmp_path / kind)
    with pytest.raises(CheckpointError, match=message):
        load(edit(folder, **changes))


NOPE, ROPE = AttentionSpec(4, 2, position="none"), AttentionSpec(4, 2, rope_dims=2)
JAMBA_MIXER = MambaSpec(inner_norm="rms", inner_norm_eps=1e-5, dt_min=1e-2)
GATED = AttentionSpec(
    4, 2, gate=True, qk_norm=True, qk_norm_kind="rms_plus_one", qk_norm_eps=1e-5, rope_dims=2
)
SHARED = MoESpec(n_experts=3, hidden=8, shared_hidden=8, shared_gate=True, z_loss_weight=0.0)
DELTA = GatedDeltaSpec(4, norm_eps=1e-5)
MODELS = {
    "jamba": (NOPE, JAMBA_MIXER, SwiGLUSpec(24), "rms"),
    "bamba": (ROPE, Mamba2Spec(head_dim=8, dt_limit=(0.1, 0.3)), SwiGLUSpec(24), "rms"),
    "qwen3_next": (GATED, DELTA, SHARED, "rms_plus_one"),
}


def model_of(attention, mixer, channel, norm):
    kinds = (mixer, attention, mixer, mixer)
    blocks = tuple(BlockSpec(kind, channel, norm) for kind in kinds)
    return build_model(ModelSpec(16, blocks, Tokens(19), norm=norm), seed=3)


@pytest.mark.parametrize("kind", MODELS)
def test_ours_are_read_by_transformers(kind, tmp_path):
    model = model_of(*MODELS[kind]).eval()
    save(model, tmp_path, kind)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    ).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert (peer(ids).logits - model(ids).logits).abs().max() <= 1e-4
    assert torch.equal(load(tmp_path)(ids).logits, model(ids).logits)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind


@pytest.mark.parametrize(
    ("kind", "place", "changes", "message"),
    [
        (
            "jamba",
            0,
            {"position": "rope"},
            "position is 'rope', and the format can only say 'none'",
        ),
        ("jamba", 1, {"inner_norm": None}, "inner_norm is None"),
        ("jamba", 1, {"expand": 1.5}, "expand is 1.5"),
        ("jamba", 2, {"bias": True}, "bias is True"),
        ("bamba", 0, {"rope_dims": None}, "rope_dims is None, and the format can only say 2"),
        ("bamba", 0, {"qk_norm": True}, "qk_norm is True"),
        ("bamba", 1, {"rms_norm": False}, "rms_norm is False"),
        ("qwen3_next", 0, {"gate": False}, "gate is False"),
        ("qwen3_next", 1, {"gated": False}, "gated is False"),
        ("qwen3_next", 1, {"negative_eigenvalues": True}, "negative_eigenvalues is True"),
        ("qwen3_next", 2, {"shared_gate": False}, "shared_gate"),
    ],
)
def test_what_a_format_cannot_say_is_refused(kind, place, changes, message, tmp_path):
    parts = list(MODELS[kind])
    parts[place] = replace(parts[place], **changes)
    with pytest.raises(CheckpointError, match=f"cannot write it as {kind}: .*{message}"):
        save(model_of(*parts), tmp_path, kind)


def test_layers_without_a_period_are_refused(tmp_path):
    model = model_of(*MODELS["jamba"])
    blocks = [model.spec.blocks[i] for i in (1, 0, 1, 1)]
    with pytest.raises(CheckpointError, match="cannot write it as jamba"):
        save(build_model(model.spec.replace(blocks=tuple(blocks))), tmp_path, "jamba")
