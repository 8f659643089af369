"""Mamba and Mamba-2 in the words of transformers, of files as llama.cpp stores them.

What is undone: A is stored as -exp(A_log), the convolution without its middle dimension, numbers
per head as columns, and the norm of Mamba-2's output by groups.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kizzasi.errors import CheckpointError
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.gguf_file import GGUFTensor

TRUNK = {
    "token_embd.weight": "backbone.embeddings.weight",
    "output_norm.weight": "backbone.norm_f.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_norm.weight": "norm.weight",
    "ssm_in.weight": "mixer.in_proj.weight",
    "ssm_conv1d.weight": "mixer.conv1d.weight",
    "ssm_conv1d.bias": "mixer.conv1d.bias",
    "ssm_a": "mixer.A_log",
    "ssm_d": "mixer.D",
    "ssm_out.weight": "mixer.out_proj.weight",
}
PARTS = {
    "mamba": LAYER
    | {
        "ssm_x.weight": "mixer.x_proj.weight",
        "ssm_dt.weight": "mixer.dt_proj.weight",
        "ssm_dt.bias": "mixer.dt_proj.bias",
    },
    "mamba2": LAYER | {"ssm_dt.bias": "mixer.dt_bias", "ssm_norm.weight": "mixer.norm.weight"},
}


def their_name(architecture: str, name: str) -> str:
    """transformers' name of a tensor; one that it has not keeps its own, to be refused."""
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if match is None:
        return TRUNK.get(name, name)
    part = PARTS[architecture].get(match[2])
    return name if part is None else f"backbone.layers.{match[1]}.{part}"


def shape_of(architecture: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that transformers stores a tensor of the file in."""
    if name.endswith("ssm_conv1d.weight") and len(shape) == 2:
        return shape[0], 1, shape[1]
    per_head = name.endswith(("ssm_a", "ssm_d", "ssm_norm.weight"))
    return (math.prod(shape),) if architecture == "mamba2" and per_head else shape


def value_of(name: str, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor as transformers stores it."""
    values = values.reshape(shape)
    return torch.log(-values) if name.endswith("ssm_a") else values


def config_of(
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, GGUFTensor],
    where: str,
) -> dict[str, Any]:
    """The metadata in the words of config.json."""
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
    keys = Config(own, where, prefix)
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{where}: no token_embd.weight in it; a part of a model, or damaged")
    d_model = keys.get("embedding_length", int)
    keys.skip("context_length")
    for key in ("feed_forward_length", "attention.head_count", "attention.head_count_kv"):
        keys.only(key, 0)
    inner = keys.get("ssm.inner_size", int)
    rank = keys.get("ssm.time_step_rank", int)
    config: dict[str, Any] = {
        "model_type": architecture,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": d_model,
        "num_hidden_layers": keys.get("block_count", int),
        "state_size": keys.get("ssm.state_size", int),
        "conv_kernel": keys.get("ssm.conv_kernel", int),
        "layer_norm_epsilon": keys.get("attention.layer_norm_rms_epsilon", float),
        "tie_word_embeddings": "output.weight" not in tensors,
        "expand": inner // max(d_model, 1),
        "intermediate_size": inner,
    }
    keys.only("vocab_size", config["vocab_size"])
    if architecture == "mamba":
        config["time_step_rank"] = rank
        keys.only("ssm.dt_b_c_rms", False)
        keys.only("ssm.group_count", 0)
    else:  # Mamba-2's ranks are its heads
        config |= {"num_heads": rank, "head_dim": inner // max(rank, 1)}
        config["n_groups"] = keys.get("ssm.group_count", int)
    keys.finish(harmless=())
    return config
