"""Families of other mixers and norms against transformers: equal logits both ways, equal bytes."""

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
from kizzasi.models import build_model, load
from kizzasi.models.checkpoints import save

IDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
TRUNK = {
    "vocab_size": 19,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **IDS,
}
XLSTM = {
    **IDS,
    "vocab_size": 19,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "qk_dim_factor": 1.0,
    "ffn_proj_factor": 0.55,
    "ffn_round_up_to_multiple_of": 8,
    "autocast_kernel_dtype": "float32",
}
DELTA = {
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 6},
    **{"linear_value_head_dim": 5, "rms_norm_eps": 1e-3, "num_key_value_heads": 4},
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
GRANITE = {
    **{"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    **{"mamba_n_heads": 6, "mamba_d_state": 4, "shared_intermediate_size": 20},
    **{"attention_multiplier": 0.3, "residual_multiplier": 0.7, "embedding_multiplier": 3.0},
    "logits_scaling": 1.25,
}
NEMOTRON = {
    **{"head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 6, "ssm_state_size": 4},
    **{"n_groups": 2, "n_routed_experts": 4, "moe_intermediate_size": 12},
    "moe_shared_expert_intermediate_size": 10,
    "time_step_min": 1e-9,  # see nemotron_h.py: so that the peer bounds no step
}
KIMI = {
    **{"num_key_value_heads": 4, "linear_num_heads": 3, "linear_head_dim": 6, "kv_lora_rank": 8},
    **{"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "num_local_experts": 4},
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 12, "rms_norm_eps": 1e-3},
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
CASES = {
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 4},
    "lfm2 biased, untied": {
        "layer_types": ["full_attention", "conv", "conv"],
        "conv_bias": True,
        "conv_L_cache": 4,
        "block_auto_adjust_ff_dim": False,
        "tie_word_embeddings": False,
        "norm_eps": 1e-3,
    },
    "recurrent_gemma": {"hidden_size": 32, "attention_window_size": 5, "lru_width": 32},
    "recurrent_gemma attending first": {
        "hidden_size": 32,
        "block_types": ["attention", "recurrent"],
        "attention_bias": True,
        "conv1d_width": 3,
        "logits_soft_cap": 3.0,
    },
    "cohere": {"logit_scale": 1.0},
    "cohere biased, untied": {
        "attention_bias": True,
        "tie_word_embeddings": False,
        "logit_scale": 2.0,
        "layer_norm_eps": 1e-3,
    },
    "cohere normed": {"use_qk_norm": True, "logit_scale": 1.0, "layer_norm_eps": 1e-3},
    "cohere2": {"sliding_window": 5, "sliding_window_pattern": 2, "logit_scale": 1.0},
    "gemma3_text": {"head_dim": 6, "sliding_window": 5, "sliding_window_pattern": 2},
    "gemma3_text stretched, capped": {
        "head_dim": 6,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        },
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 9,
        "attention_bias": True,
    },
    "gpt_oss": {
        **{"head_dim": 8, "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2},
        **{"swiglu_limit": 1.0, "rms_norm_eps": 1e-3},
    },
    "gpt_oss without biases, stretched otherwise": {
        **{"head_dim": 6, "num_local_experts": 3, "num_experts_per_tok": 2},
        **{"attention_bias": False, "layer_types": ["full_attention"] * 3},
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e3},
    },
    "qwen3_5_text": {**DELTA, "head_dim": 8},
    "qwen3_5_text biased, tied": {
        **{**DELTA, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
        **{"layer_types": ["full_attention", "linear_attention", "linear_attention"]},
    },
    "olmo_hybrid": {**DELTA, "linear_num_key_heads": 4, "linear_value_head_dim": 6},
    "olmo_hybrid without positions": {
        **{**DELTA, "linear_allow_neg_eigval": False, "linear_value_head_dim": 3},
        "rope_parameters": {"rope_type": "default", "rope_theta": None},
    },
    "granitemoehybrid": {
        **{**GRANITE, "num_local_experts": 3, "position_embedding_type": "rope"},
        **{"mamba_n_groups": 2, "rms_norm_eps": 1e-3},
    },
    "granitemoehybrid dense": {
        **{**GRANITE, "num_local_experts": 0, "tie_word_embeddings": True},
        **{"attention_bias": True, "mamba_proj_bias": True},
    },
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_state": 4, "mamba_d_ssm": 32},
    "falcon_h1 normed, biased": {
        **{"mamba_n_heads": 4, "mamba_d_state": 4, "mamba_d_ssm": 40, "mamba_n_groups": 2},
        **{"mamba_rms_norm": True, "mamba_proj_bias": True, "projectors_bias": True},
        **{"attention_bias": True, "mlp_bias": True, "mamba_norm_before_gate": False},
        **{"embedding_multiplier": 3.0, "lm_head_multiplier": 0.5, "rms_norm_eps": 1e-3},
    },
    "nemotron_h": {
        **{**NEMOTRON, "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]},
        "num_hidden_layers": 4,
    },
    "nemotron_h mixed, biased": {
        **{**NEMOTRON, "mlp_bias": True, "norm_topk_prob": False, "routed_scaling_factor": 2.0},
        "layers_block_type": ["linear_attention", "full_attention", "moe", "linear_attention"],
        "num_hidden_layers": 4,
    },
    "kimi_linear": {**KIMI, "mlp_layer_types": ["sparse"] * 3},
    "kimi_linear grouped": {
        **{**KIMI, "mlp_layer_types": ["sparse"] * 3, "q_lora_rank": 6, "n_group": 2},
        **{"n_shared_experts": 2, "norm_topk_prob": False, "linear_conv_kernel_dim": 3},
    },
    "xlstm": XLSTM,
    "xlstm capped": {**XLSTM, "output_logit_soft_cap": 2.0, "norm_eps": 1e-3, "gate_soft_cap": 2.0},
}


def sizes_of(case):
    return CASES[case] if case.startswith("xlstm") else TRUNK | CASES[case]


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    folder, kind = tmp_path_factory.mktemp("kinds") / "theirs", request.param.split()[0]
    return make_peer(kind, sizes_of(request.param), folder), folder, kind


def test_logits_of_prefill_and_of_cached_decoding(made):
    peer, folder, _ = made
    assert difference(peer, load(folder)) <= 1e-4


NARROW = ("gpt_oss", "kimi_linear", "nemotron_h mixed", "recurrent_gemma", "xlstm")
EXACT = [case for case in CASES if not case.startswith(NARROW)]


@pytest.mark.parametrize("case", EXACT)
def test_logits_in_float64(case, tmp_path, monkeypatch):
    """Those that are missing have kernels, routers or stretched positions in float32."""
    hold_to_float64(monkeypatch)
    peer = make_peer(case.split()[0], sizes_of(case), tmp_path, torch.float64)
    ropes = getattr(peer.config, "rope_parameters", None)
    rotary = getattr(peer.model, "rotary_emb", None)
    for name, buffer in () if rotary is None else rotary.named_buffers():  # made in float32
        said = ropes.get(name.removesuffix("_inv_freq").removesuffix("_original"), ropes)
        n = 2 * len(buffer)
        exact = said["rope_theta"] ** -(torch.arange(0, n, 2, dtype=torch.float64) / n)
        buffer.data = exact / said.get("factor", 1.0)
    assert difference(peer, load(tmp_path)) <= 1e-9


def test_read_and_write_gives_the_same_file_and_the_same_logits(made, tmp_path):
    peer, folder, kind = made
    assert_round_trip(peer, folder, tmp_path, kind)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    root = tmp_path_factory.mktemp("stored")
    for kind in sorted({case.split()[0] for case in CASES}):
        make_peer(kind, sizes_of(kind), root / kind)
    return root


def test_projections_that_xlstm_fuses(stored, tmp_path):
    """weight_mode "fused", of which this transformers makes no model."""
    folder = shutil.copytree(stored / "xlstm", tmp_path / "fused")
    tensors = load_file(folder / "model.safetensors")
    joined = {
        "mlstm_layer.qkv_opreact": [f"mlstm_layer.{x}" for x in ("q", "k", "v", "ogate_preact")],
        "mlstm_layer.ifgate_preact": [f"mlstm_layer.{x}gate_preact" for x in "if"],
        "ffn.proj_up_gate_z": ["ffn.proj_up_gate", "ffn.proj_up"],
    }
    for layer in ("backbone.blocks.0.", "backbone.blocks.1."):
        for name, parts in joined.items():
            for leaf in ("weight", "bias"):
                found = [tensors.pop(f"{layer}{part}.{leaf}", None) for part in parts]
                if found[0] is not None:
                    tensors[f"{layer}{name}.{leaf}"] = torch.cat(found)
    save_file(tensors, folder / "model.safetensors")
    ids = torch.arange(12)[None]
    model = load(edit(folder, weight_mode="fused"))
    assert torch.equal(model(ids).logits, load(stored / "xlstm")(ids).logits)


def test_filters_that_olmo_hybrid_cuts_in_thirds(tmp_path):
    """As transformers 5.24 writes them; ours have the widths of queries, keys and values."""
    peer = make_peer("olmo_hybrid", TRUNK | DELTA, tmp_path / "theirs")
    name = "model.layers.0.linear_attn.v_conv1d.weight"
    assert load_file(tmp_path / "theirs" / "model.safetensors")[name].shape == (14, 1, 4)
    model = load(tmp_path / "theirs")
    assert difference(peer, model) <= 1e-4
    save(model, tmp_path / "ours", "olmo_hybrid")
    assert load_file(tmp_path / "ours" / "model.safetensors")[name].shape == (20, 1, 4)
    reread = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert difference(reread.eval(), load(tmp_path / "ours")) <= 1e-4


def test_factors_of_falcon_h1_become_part_of_the_weights(tmp_path):
    sizes = (
        TRUNK
        | CASES["falcon_h1 normed, biased"]
        | {
            **{
                "key_multiplier": 0.4,
                "attention_in_multiplier": 1.5,
                "attention_out_multiplier": 0.6,
            },
            **{"ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.7, "mlp_multipliers": [0.9, 0.8]},
            "ssm_multipliers": [0.5, 0.75, 1.25, 1.5, 0.6],
        }
    )
    peer = make_peer("falcon_h1", sizes, tmp_path / "theirs")
    model = load(tmp_path / "theirs")
    assert difference(peer, model) <= 1e-4
    save(model, tmp_path / "ours", "falcon_h1")
    reread = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert reread.config.key_multiplier == 1.0
    assert difference(reread.eval(), model) <= 1e-4
    again = load(tmp_path / "ours").state_dict()
    assert all(torch.equal(t, again[name]) for name, t in model.state_dict().items())


def test_kimi_linears_dense_channels_are_named_in_two_ways(tmp_path):
    peer = make_peer("kimi_linear", TRUNK | KIMI, tmp_path / "theirs")
    model = load(tmp_path / "theirs")
    assert difference(peer, model) <= 1e-4
    save(model, tmp_path / "ours", "kimi_linear")
    path = tmp_path / "ours" / "model.safetensors"
    assert "model.layers.0.mlp.up_proj.weight" in load_file(path)
    reread = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert difference(reread.eval(), load(tmp_path / "ours")) <= 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"n_value_heads": 6},
        {"expand_v": 2.0},
        {"conv": False},
        {"conv_bias": True},
        {"gate_bias": True},
        {"negative_eigenvalues": True},
        {"gate_floor": -5.0},
        {"channel_gates": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_kimi_linear_cannot_say_is_refused(changes, stored, tmp_path):
    spec = load(stored / "kimi_linear").spec
    blocks = [
        replace(block, mixer=replace(block.mixer, **changes))
        if block.mixer.kind == "kda"
        else block
        for block in spec.blocks
    ]
    assert blocks != [*spec.blocks]
    other = build_model(spec.replace(blocks=tuple(blocks)), dtype=torch.float32)
    with pytest.raises(CheckpointError, match="cannot write it as kimi_linear"):
        save(other, tmp_path / "ours", "kimi_linear")


def test_keys_of_published_files(stored, tmp_path):
    """As in LFM2-1.2B, recurrentgemma-2b, gemma-3-1b and xLSTM-7b."""
    published = {
        "lfm2": {
            "block_auto_adjust_ff_dim": True,
            "block_dim": 24,
            "block_ff_dim": 32,
            "block_use_swiglu": True,
            "conv_dim": 24,
            "conv_use_xavier_init": True,
            "layer_types": None,
            "full_attn_idxs": [1],
            "norm_eps": 1e-5,
            "rope_parameters": None,
            "theta": 1e6,
            "tie_embedding": True,
            "use_pos_enc": True,
        },
        "recurrent_gemma": {
            "final_w_init_variance_scale": 0.7,
            "rope_parameters": None,
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        },
        "cohere2": {"layer_types": None, "sliding_window_pattern": 2},
        "gemma3_text": {
            "layer_types": None,
            "_sliding_window_pattern": None,
            "sliding_window_pattern": 2,
            "rope_parameters": None,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": None,
        },
        "qwen3_5_text": {
            "rope_parameters": {
                **{"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
                **{"mrope_section": [1, 0, 0], "mrope_interleaved": True},
            },
            "full_attention_interval": 4,
        },
        "granitemoehybrid": {
            "layer_types": ["mamba", "attention", "mamba"],
            "normalization_function": "rmsnorm",
            "init_method": "mup",
        },
        "kimi_linear": {
            **{"layer_types": None, "mlp_layer_types": None, "first_k_dense_replace": 0},
            **{"linear_num_heads": None, "linear_head_dim": None, "mla_use_nope": True},
            **{"moe_layer_freq": 1, "rope_theta": 1e4, "use_grouped_topk": True},
            "moe_router_activation_func": "sigmoid",
            "linear_attn_config": {
                **{"full_attn_layers": [2], "kda_layers": [1, 3], "head_dim": 6, "num_heads": 3},
                "short_conv_kernel_size": 4,
            },
        },
        "nemotron_h": {
            **{"layers_block_type": None, "hybrid_override_pattern": "M-*-", "expand": 2},
            **{"num_hidden_layers": 4, "attention_head_dim": 8, "use_bias": False},
        },
        "xlstm": {"hidden_size": None, "embedding_dim": 64, "num_hidden_layers": None},
    }
    for kind, keys in published.items():
        folder = shutil.copytree(stored / kind, tmp_path / kind)
        spec = load(folder).spec
        assert load(edit(folder, **keys)).spec == spec, kind


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("lfm2", {"layer_types": ["conv", "mamba", "conv"]}, "layer_types: .* are not 3 of"),
        ("lfm2", {"use_pos_enc": False}, "use_pos_enc: False is not supported"),
        ("lfm2", {"block_multiple_of": 0}, "block_multiple_of: 0 is below 1"),
        ("lfm2", {"conv_L_cache": 4}, "does not fit its config"),
        ("recurrent_gemma", {"block_types": ["mamba"]}, "block_types: .* are not of"),
        ("recurrent_gemma", {"lru_width": 10**9}, "n_heads: 4 does not|GiB|does not fit"),
        ("cohere", {"use_qk_norm": True}, "missing .*q_norm"),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "bfloat16 by transformers"),
        ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha: 1.5 is not supported"),
        ("gpt_oss", {"num_local_experts": 10**9}, "num_experts: 1000000000 cannot be"),
        ("cohere2", {"sliding_window": -1}, "window: -1"),
        ("gemma3_text", {"attn_logit_softcapping": 4.0}, "attn_logit_softcapping: 4.0 is not"),
        ("gemma3_text", {"rope_parameters": {"other": {}}}, "rope_parameters.other"),
        ("granitemoehybrid", {"layer_types": ["rwkv"] * 3}, "layer_types: .* are not 3 of"),
        ("granitemoehybrid", {"num_local_experts": 10**9}, "num_experts: 1000000000 cannot be"),
        ("falcon_h1", {"mlp_multipliers": [2.0]}, "mlp_multipliers: 1 numbers; 2 are needed"),
        ("falcon_h1", {"projectors_bias": True}, "projectors_bias: True is not supported"),
        ("nemotron_h", {"layers_block_type": ["mlp"] * 4}, "mlp at 0 stands behind no mixer"),
        ("nemotron_h", {"n_routed_experts": 10**9}, "n_routed_experts: 1000000000 cannot be"),
        ("nemotron_h", {"moe_latent_size": 8}, "moe_latent_size: 8 is not supported"),
        ("kimi_linear", {"num_experts": 10**9}, "n_routed_experts: 1000000000 cannot be"),
        ("kimi_linear", {"mlp_layer_types": ["sparse"]}, "are not 3 of dense, sparse"),
        (
            "kimi_linear",
            {"linear_attn_config": {"kda_layers": [0]}},
            "kda_layers: with full",
        ),
        ("kimi_linear", {"mla_use_nope": False}, "mla_use_nope: False is not supported"),
        ("xlstm", {"use_bias": True}, "use_bias: True is not supported"),
        ("xlstm", {"add_out_norm": False}, "add_out_norm: False"),
        ("xlstm", {"num_blocks": 10**9}, "num_blocks: 1000000000 cannot be"),
    ],
)
def test_refused_configs(kind, changes, message, stored, tmp_path):
    folder = shutil.copytree(stored / kind, tmp_path / kind)
    with pytest.raises(CheckpointError, match=message):
        load(edit(folder, **changes))


@pytest.mark.parametrize(
    ("kind", "part", "changes", "message"),
    [
        ("lfm2", "mixer", {"bias": True}, r"blocks\[2\]\.mixer\.bias is False|conv_bias|no name"),
        ("recurrent_gemma", "channel", {"activation": "silu"}, "activation is 'silu'"),
        ("cohere", "mixer", {"qk_norm": True}, "qk_norm is True"),
        ("gpt_oss", "mixer", {"sinks": False}, "sinks is False"),
        ("granitemoehybrid", "mixer", {"norm_before_gate": True}, "norm_before_gate is True"),
        ("falcon_h1", "mixer", {"combine": "weighted"}, "no name for|combine is 'weighted'"),
        ("nemotron_h", "channel", {"activation": "gelu"}, "activation is 'gelu'"),
        ("gemma3_text", "mixer", {"rope_theta": 2e4}, r"rope_theta is \d+"),
        ("xlstm", "mixer", {"norm_eps": 1e-2}, r"norm_eps is 0\.01"),
    ],
)
def test_what_a_format_cannot_say_is_refused(kind, part, changes, message, stored, tmp_path):
    spec = load(stored / kind).spec
    block = spec.blocks[0]
    odd = replace(block, **{part: replace(getattr(block, part), **changes)})
    model = build_model(spec.replace(blocks=(odd, *spec.blocks[1:])))
    with pytest.raises(CheckpointError, match=f"cannot write it as {kind}: .*({message})"):
        save(model, tmp_path / "out", kind)
