"""Foreign families against transformers: equal logits both ways, equal bytes after a round trip."""

import json

import pytest
import torch
from peers import decode
from safetensors.torch import load_file, save_file

from kizzasi.errors import CheckpointError
from kizzasi.models import load
from kizzasi.models.checkpoints import foreign, formats, save

transformers = pytest.importorskip("transformers", reason="parity needs transformers")

TRUNK = {
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
FEW = {"num_experts": 3, "num_experts_per_tok": 2}
STRETCH = {"factor": 4.0, "original_max_position_embeddings": 8}
LATENT = {
    "moe_intermediate_size": 12,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 3,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_mtp_layers": 0,
}
CASES = {
    "llama": {},
    "llama biased, tied": {
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "head_dim": 6,
    },
    "llama linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 2.0}},
    "llama yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **STRETCH}},
    "llama llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            **STRETCH,
        }
    },
    "mistral": {"sliding_window": 5},
    "qwen2": {
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen3": {"head_dim": 6, "rms_norm_eps": 1e-4, "attention_bias": True},
    "phi3": {"sliding_window": 5},
    "phi3 partly turned, tied": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e3,
            "partial_rotary_factor": 0.5,
        },
        "tie_word_embeddings": True,
        "num_attention_heads": 2,
        "original_max_position_embeddings": 64,
    },
    "deepseek_v3": LATENT,
    "deepseek_v3 yarn": {
        **LATENT,
        "q_lora_rank": None,
        "norm_topk_prob": False,
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
        "rope_parameters": {
            **STRETCH,
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        },
    },
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16, "resid_pdrop": 0.2},
    "gpt2 untied": {
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 16,
        "n_inner": 20,
        "activation_function": "relu",
        "tie_word_embeddings": False,
    },
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 5},
    "qwen3_moe": {
        "moe_intermediate_size": 12,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 5,
        **FEW,
    },
    "olmo2": {"rms_norm_eps": 1e-4},
    "olmo2 biased": {"attention_bias": True, "num_key_value_heads": 4},
    "gemma2": {
        "head_dim": 6,
        "query_pre_attn_scalar": 9,
        "sliding_window": 5,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 3.0,
        "num_hidden_layers": 3,
    },
    "granite": {
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 3.0,
        "logits_scaling": 1.25,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "gpt_neox": {"rope_parameters": {"rope_theta": 5e3, "partial_rotary_factor": 0.5}},
    "gpt_neox one after the other": {
        "use_parallel_residual": False,
        "hidden_act": "relu",
        "rope_parameters": {"partial_rotary_factor": 1.0},
        "layer_norm_eps": 1e-4,
    },
    "olmoe": {"clip_qkv": 1.0, "rms_norm_eps": 1e-4, "num_hidden_layers": 1, **FEW},
}


def make(case, folder, dtype=torch.float32):
    """Save a random model of transformers, with weights large enough to tell mistakes."""
    kind = case.split()[0]
    trunk = {"vocab_size": 19, "bos_token_id": None, "eos_token_id": None}
    trunk = trunk if kind == "gpt2" else TRUNK
    if kind == "gpt_neox":
        trunk = {key: value for key, value in TRUNK.items() if key != "num_key_value_heads"}
    config = transformers.AutoConfig.for_model(kind, **{**trunk, **CASES[case]})
    peer = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=dtype
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in peer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (p.ndim == 1))
        for name, bias in peer.named_buffers():
            if name.endswith("e_score_correction_bias"):
                bias.copy_(torch.randn(bias.shape, generator=generator) * 0.3)
    peer.save_pretrained(folder)
    return peer.eval()


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign") / "theirs"
    return make(request.param, folder), folder, request.param.split()[0]


@torch.no_grad()
def assert_equal_logits(peer, model, bound):
    ids = torch.randint(19, (2, 14), generator=torch.Generator().manual_seed(1))
    whole = model(ids).logits
    assert (whole - peer(ids).logits).abs().max() <= bound
    out = model(ids[:, :6])
    steps = [out.logits]
    for t in range(6, ids.shape[1]):
        out = model.step(ids[:, t], out.state)
        steps.append(out.logits[:, None])
    assert (torch.cat(steps, dim=1) - decode(peer, ids, 6)).abs().max() <= bound
    assert whole.std() > 0.1


def test_logits_of_prefill_and_of_cached_decoding(made):
    peer, folder, _ = made
    model = load(folder)
    assert not model.training
    assert_equal_logits(peer, model, 1e-4)


def test_float64_where_the_peer_keeps_it(tmp_path):
    """GPT-2 only: Llama's norms, angles and softmax are float32 in transformers."""
    peer = make("gpt2", tmp_path, torch.float64)
    model = load(tmp_path)
    assert next(model.parameters()).dtype == torch.float64
    assert_equal_logits(peer, model, 1e-9)


def test_read_and_write_gives_the_same_file_and_the_same_logits(made, tmp_path):
    peer, folder, kind = made
    load(folder).save_pretrained(tmp_path / "ours")
    save(load(tmp_path / "ours"), tmp_path / "again", kind)
    theirs, again = (path / "model.safetensors" for path in (folder, tmp_path / "again"))
    assert again.read_bytes() == theirs.read_bytes()
    assert load(tmp_path / "again").spec == load(folder).spec
    reread, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    ids = torch.arange(12)[None]
    assert torch.equal(reread(ids).logits, peer(ids).logits)


@pytest.mark.parametrize("case", ["gpt2", "qwen3_moe"])
def test_bfloat16_files_come_back_byte_for_byte(case, tmp_path):
    """Though norms and routers are float32 in our bfloat16 models."""
    make(case, tmp_path / "theirs", torch.bfloat16)
    model = load(tmp_path / "theirs")
    assert model.stem.embedding.weight.dtype == torch.bfloat16
    assert model.norm.weight.dtype == torch.float32
    save(model, tmp_path / "again", case)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("theirs", "again")]
    assert files[0] == files[1]
    with torch.no_grad():
        model.norm.weight.add_(1e-5)  # no longer a bfloat16 number
    save(model, tmp_path / "again", case, overwrite=True)
    stored = load_file(tmp_path / "again" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_experts_stacked_as_in_memory_are_read_too(case, tmp_path):
    from safetensors.torch import save_file

    peer = make(case, tmp_path)
    stacked = {name: t.clone() for name, t in peer.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in stacked)
    save_file(stacked, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_equal_logits(peer, load(tmp_path), 1e-4)


def test_the_base_model_of_gpt2_with_its_masks(tmp_path):
    """OpenAI's own file: no prefix, and buffers that are no weights."""
    peer = make("gpt2", tmp_path)
    tensors = {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.bool) for i in range(2)}
    tensors |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    tensors |= {n.removeprefix("transformer."): t for n, t in peer.state_dict().items()}
    del tensors["lm_head.weight"]
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert_equal_logits(peer, load(tmp_path), 1e-4)


OLD = {
    "llama yarn": {
        "rope_theta": 1e4,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    },
    "mistral": {"rope_theta": 1e4, "rope_scaling": None},
}


@pytest.mark.parametrize("case", OLD)
def test_configs_of_transformers_4(case, tmp_path):
    make(case, tmp_path)
    spec = load(tmp_path).spec
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"], config["dtype"]
    config |= {"torch_dtype": "float32", "transformers_version": "4.31.0", **OLD[case]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path).spec == spec


def test_formats_are_listed():
    assert formats()[0] == "kizzasi"
    assert {case.split()[0] for case in CASES} <= set(formats()) - {"kizzasi"}
    assert set(formats()[1:]) == set(foreign.FAMILIES)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path):
    """DeepSeek's files hold one behind the last layer."""
    peer = make("deepseek_v3", tmp_path)
    path = tmp_path / "model.safetensors"
    beyond = {f"model.layers.2.{part}.weight": torch.ones(3) for part in ("eh_proj", "enorm")}
    save_file(load_file(path) | beyond, path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_equal_logits(peer, load(tmp_path), 1e-4)
    save_file(load_file(path) | {"model.layers.1.eh_proj.weight": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match=r"unexpected model\.layers\.1\.eh_proj"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave: False"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias: True"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek_v3", {"n_routed_experts": 10**9}, "n_routed_experts: 1000000000 cannot be"),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type"),
    ],
)
def test_what_a_spec_cannot_say_is_refused(tmp_path, case, change, message):
    make(case, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)
