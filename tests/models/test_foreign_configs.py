"""Foreign configs: every key is used, known to be harmless, or refused by name; and what a format
cannot say is refused in writing."""

import json
from dataclasses import replace

import pytest
import torch

from kizzasi.errors import CheckpointError
from kizzasi.models import BlockSpec, ModelSpec, Signal, Tokens, build_model, load
from kizzasi.models.attention.rope_scaling import RopeScaling
from kizzasi.models.channels import MLPSpec, SwiGLUSpec
from kizzasi.models.channels.moe import MoESpec
from kizzasi.models.checkpoints import save
from kizzasi.models.mixers import AttentionSpec, MambaSpec
from kizzasi.models.moe import upcycle

HEADS = AttentionSpec(4, 2, head_dim=4)
LLAMA = ModelSpec(16, (BlockSpec(HEADS, SwiGLUSpec(24)),) * 2, Tokens(11))
MIXTURE = MoESpec(n_experts=3, top_k=2, hidden=8, balance_weight=0.01, z_loss_weight=0.0)
NORMED = replace(HEADS, qk_norm=True, qk_norm_eps=1e-5)
GPT2 = ModelSpec(
    16,
    (
        BlockSpec(
            AttentionSpec(4, position="none", qkv_bias=True, out_bias=True),
            MLPSpec(activation="gelu_tanh", bias=True),
            norm="layer",
        ),
    ),
    Tokens(11, 8),
    norm="layer",
    tie_head=True,
    dropout=0.25,
)


def mixtures(mixer, channel=MIXTURE):
    return ModelSpec(16, (BlockSpec(mixer, channel),) * 2, Tokens(11))


MODELS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA.replace(blocks=(BlockSpec(replace(HEADS, qkv_bias=True), SwiGLUSpec(24)),)),
    "qwen3": LLAMA.replace(blocks=(BlockSpec(NORMED, SwiGLUSpec(24)),)),
    "gpt2": GPT2,
    "mixtral": mixtures(HEADS),
    "qwen3_moe": mixtures(NORMED),
    "olmoe": mixtures(replace(NORMED, qk_norm="full")),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("foreign")
    for name, spec in MODELS.items():
        save(build_model(spec, seed=1), root / name, name)
    return root


@pytest.fixture
def edited(folders, tmp_path):
    """A folder whose config.json differs from what was written; None removes a key."""

    def edit(name, **changes):
        config = json.loads((folders / name / "config.json").read_text()) | changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        weights = tmp_path / "model.safetensors"
        weights.unlink(missing_ok=True)
        weights.symlink_to(folders / name / "model.safetensors")
        return tmp_path

    return edit


@pytest.mark.parametrize("name", MODELS)
def test_what_was_written_is_read(folders, name):
    model = load(folders / name)
    for ours, theirs in zip(model.spec.blocks, MODELS[name].blocks, strict=True):
        assert ours.mixer.kind == theirs.mixer.kind
    expected = build_model(MODELS[name], seed=1).state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items())
    save(model, folders / "again", name, overwrite=True)
    for file in ("config.json", "model.safetensors"):
        assert (folders / "again" / file).read_bytes() == (folders / name / file).read_bytes()


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"residual_multiplier": 2.0}, "residual_multiplier: 2.0 is unknown here"),
        ("llama", {"quantization_config": {}}, "quantization_config: {} is unknown"),
        ("llama", {"auto_map": {"AutoModel": "x"}}, "auto_map"),
        ("llama", {"model_type": "lama"}, "model_type 'lama' is not supported; only .*llama"),
        ("llama", {"model_type": ["llama"]}, "model_type"),
        ("llama", {"model_type": None}, "unknown format"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported; only 'silu'"),
        ("llama", {"hidden_size": None}, "hidden_size: missing"),
        ("llama", {"hidden_size": "16"}, "hidden_size: expected int, got '16'"),
        ("llama", {"hidden_size": 32}, "does not fit its config"),
        ("llama", {"hidden_size": 10**15}, "does not fit its config"),
        ("llama", {"hidden_size": 10**30}, r"hidden_size: 10*0 is beyond 2\^64"),
        ("llama", {"hidden_size": -4}, "d_model: -4"),
        ("llama", {"num_hidden_layers": 3}, r"missing model\.layers\.2"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 cannot be"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers: 0 cannot be"),
        ("llama", {"num_attention_heads": 0}, "n_heads: 0"),
        ("llama", {"num_key_value_heads": 3}, "n_kv_heads: 3 does not divide"),
        ("llama", {"attention_bias": True}, "missing .*bias"),
        ("llama", {"rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN}, "remove"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("llama", {"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "'longrope'"),
        ("llama", {"rope_scaling": {**YARN, "mscale": 0.7}}, r"rope_scaling\.mscale: 0\.7"),
        ("llama", {"rope_scaling": {**YARN, "truncate": 0}}, "truncate: expected bool"),
        ("llama", {"rope_scaling": {**YARN, "factor": "2"}}, "factor: expected float"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor: missing"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": {"full_attention": {}}}, "full_attention"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved: True is not supported"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("qwen2", {"layer_types": ["full_attention"] * 2}, "layer_types: 2 of them for 1 layers"),
        ("qwen2", {"layer_types": ["linear_attention"]}, "layer_types: .* not supported"),
        ("qwen2", {"layer_types": ["sliding_attention"]}, "use_sliding_window: no window"),
        ("gpt2", {"activation_function": "tanh"}, "activation_function: 'tanh'"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"n_positions": 9}, r"wpe\.weight is \(8, 16\), not \(9, 16\)"),
        ("mixtral", {"num_local_experts": 10**9}, "num_experts: 1000000000 cannot be"),
        ("mixtral", {"num_local_experts": 2}, "unexpected .*experts.2"),
        ("mixtral", {"num_experts_per_tok": 4}, "top_k: 4 is more than the 3"),
        ("qwen3_moe", {"num_local_experts": 4}, "num_experts: 3, but num_local_experts is 4"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}, "leave no mixture of experts"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step: 0"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, r"missing model\.layers\.0\.mlp\.down_proj"),
        ("olmoe", {"clip_qkv": -1.0}, r"clip_qkv: -1\.0"),
    ],
)
def test_what_we_lack_and_what_lies_is_refused(edited, name, changes, message):
    with pytest.raises(CheckpointError, match=message):
        load(edited(name, **changes))


@pytest.mark.parametrize("name", MODELS)
def test_harmless_keys(edited, folders, name):
    harmless = {"architectures": ["X"], "use_cache": False, "torch_dtype": "bfloat16", "odd": None}
    assert load(edited(name, **harmless)).spec == load(folders / name).spec


def test_a_rotary_type_of_the_list_is_used(edited):
    scaling = load(edited("llama", rope_scaling=YARN)).spec.blocks[0].mixer.rope_scaling
    assert scaling == RopeScaling("yarn", 2.0, 16)
    given = edited("llama", rope_scaling={**YARN, "truncate": False})
    assert load(given).spec.blocks[0].mixer.rope_scaling == replace(scaling, truncate=False)
    short = {key: YARN[key] for key in ("rope_type", "factor")}
    given = edited("llama", rope_scaling=short, max_position_embeddings=48)
    assert load(given).spec.blocks[0].mixer.rope_scaling == RopeScaling("yarn", 2.0, 48)


def llama(**changes):
    return LLAMA.replace(blocks=(replace(LLAMA.blocks[0], **changes),) * 2)


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("llama", llama(mixer=replace(HEADS, softcap=2.0)), r"blocks\[0\]\.mixer\.softcap is 2\.0"),
        ("llama", llama(mixer=replace(HEADS, window=3)), r"mixer\.window is 3"),
        ("llama", llama(mixer=replace(HEADS, position="alibi")), r"mixer\.position is 'alibi'"),
        ("llama", llama(mixer=replace(HEADS, qkv_bias=True)), r"mixer\.out_bias is False"),
        ("llama", llama(mixer=NORMED), r"mixer\.qk_norm"),
        (
            "llama",
            llama(mixer=replace(HEADS, rope_scaling=RopeScaling("ntk", 2.0))),
            "rope_scaling",
        ),
        ("llama", llama(mixer=MambaSpec()), r"blocks\[0\]\.mixer: mamba"),
        ("llama", llama(channel=None), r"blocks\[0\]\.channel is None"),
        ("llama", llama(channel=MLPSpec(24)), r"blocks\[0\]\.channel"),
        ("llama", llama(norm="layer"), r"blocks\[0\]\.norm|no name for"),
        ("llama", LLAMA.replace(dropout=0.1), "dropout is 0.1, and the format can only say 0.0"),
        ("llama", LLAMA.replace(embed_norm=True), "no name for embed_norm"),
        ("llama", LLAMA.replace(stem=Tokens(11, 8)), "no name for stem.position_embedding"),
        ("llama", LLAMA.replace(stem=Signal(2, 2)), "stem: signal"),
        (
            "mistral",
            LLAMA.replace(
                blocks=(llama(mixer=replace(HEADS, window=3)).blocks[0], LLAMA.blocks[0])
            ),
            r"blocks\[1\]\.mixer\.window is None, and the format can only say 3",
        ),
        ("mixtral", LLAMA, "no block has a mixture"),
        ("mixtral", mixtures(HEADS, replace(MIXTURE, shared_hidden=4)), "no name for .*shared"),
        ("mixtral", mixtures(HEADS, replace(MIXTURE, normalize="all")), "normalize is 'all'"),
        ("olmoe", mixtures(NORMED), "qk_norm is True, and the format can only say 'full'"),
        ("gpt2", LLAMA, "learned positions"),
        ("gpt2", GPT2.replace(norm="rms"), "norm is 'rms'|no name"),
    ],
)
def test_what_a_format_cannot_say_is_refused(tmp_path, name, spec, message):
    with pytest.raises(CheckpointError, match=message):
        save(build_model(spec), tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_an_upcycled_model_becomes_a_mixtral(tmp_path):
    """Its experts are listed one by one in the spec, and its z-loss is of training only."""
    model = upcycle(build_model(LLAMA, seed=1), 3)
    save(model, tmp_path, "mixtral")
    again = load(tmp_path)
    ids = torch.arange(9)[None]
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    assert [b.channel.balance_weight for b in again.spec.blocks] == [0.01, 0.01]
