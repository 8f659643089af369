"""Mamba and Mamba-2 in GGUF: models equal those of transformers, cached decoding included."""

import numpy as np
import pytest
import torch
from tolerance import assert_close

gguf = pytest.importorskip("gguf", reason="the files are written by the package gguf")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers")

from kizzasi.errors import CheckpointError  # noqa: E402
from kizzasi.models import load  # noqa: E402

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "layer_norm_epsilon": 1e-4}
PEERS = {
    "mamba": SIZES | {"state_size": 8, "time_step_rank": 3, "tie_word_embeddings": True},
    "mamba2": SIZES
    | {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8, "tie_word_embeddings": False},
}
NAMES = {
    "norm": "attn_norm",
    "mixer.in_proj": "ssm_in",
    "mixer.conv1d": "ssm_conv1d",
    "mixer.x_proj": "ssm_x",
    "mixer.dt_proj": "ssm_dt",
    "mixer.out_proj": "ssm_out",
    "mixer.norm": "ssm_norm",
}
FLAT = {"backbone.embeddings": "token_embd", "backbone.norm_f": "output_norm", "lm_head": "output"}


def peer(name):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **PEERS[name])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    return model


def entry(name, tensor, config):
    """Name and values of a tensor in the file."""
    values = tensor.detach().numpy()
    stem, leaf = name.rsplit(".", 1)
    if stem in FLAT:
        return f"{FLAT[stem]}.{leaf}", values
    _, _, index, part = name.split(".", 3)
    two = config.model_type == "mamba2"
    if part == "mixer.A_log":
        return f"blk.{index}.ssm_a", -np.exp(values[:, None] if two else values)
    if part == "mixer.D":
        return f"blk.{index}.ssm_d", values[:, None] if two else values
    if part == "mixer.dt_bias":
        return f"blk.{index}.ssm_dt.bias", values
    if part == "mixer.norm.weight":
        values = values.reshape(config.n_groups, -1)
    if part == "mixer.conv1d.weight":
        values = values[:, 0]
    stem, leaf = part.rsplit(".", 1)
    return f"blk.{index}.{NAMES[stem]}.{leaf}", values


def write(path, model, **more):
    config, name = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(2**20)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_state_size(config.state_size)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    if name == "mamba":
        writer.add_ssm_inner_size(config.intermediate_size)
        writer.add_ssm_time_step_rank(config.time_step_rank)
        writer.add_ssm_dt_b_c_rms(more.get("normed", False))
    else:
        writer.add_ssm_inner_size(config.num_heads * config.head_dim)
        writer.add_ssm_time_step_rank(config.num_heads)
        writer.add_ssm_group_count(config.n_groups)
    for key, tensor in model.state_dict().items():
        if not (config.tie_word_embeddings and key.startswith("lm_head")):
            writer.add_tensor(*entry(key, tensor, config))
    for key, values in more.get("extra", ()):
        writer.add_tensor(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", PEERS)
def test_logits_equal_the_original(tmp_path, name):
    original = peer(name)
    model = load(write(tmp_path / "model.gguf", original))
    ids = torch.arange(18).view(2, 9) * 5 % 60
    with torch.no_grad():
        wanted = original(ids).logits
        assert_close(model(ids).logits, wanted)
        out = model(ids[:, :5])
        steps, state = [out.logits], out.state
        for i in range(5, 9):
            out = model.step(ids[:, i], state)
            state = out.state
            steps.append(out.logits[:, None])
        assert_close(torch.cat(steps, 1), wanted)
    assert model.spec.tie_head == original.config.tie_word_embeddings


def test_what_is_not_understood_is_refused(tmp_path):
    model = peer("mamba")
    with pytest.raises(CheckpointError, match="dt_b_c_rms: True is not supported"):
        load(write(tmp_path / "a.gguf", model, normed=True))
    extra = [("blk.0.ssm_b_norm.weight", np.ones(8, np.float32))]
    with pytest.raises(CheckpointError, match=r"unexpected blk\.0\.ssm_b_norm\.weight"):
        load(write(tmp_path / "b.gguf", model, extra=extra))
