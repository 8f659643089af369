"""GPT-NeoX and Pythia, as transformers stores them: both branches read the stream side by side.

The rows of `query_key_value` are grouped by head: its queries, its keys, its values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kizzasi.errors import SpecError
from kizzasi.models.channels.mlp import MLPSpec
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.families.llama import canonical, depth, first, vocabulary
from kizzasi.models.checkpoints.foreign import Family, Rules, register
from kizzasi.models.checkpoints.names import Form, Rule, renamed
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.ops.activations import Activation
from kizzasi.models.spec import BlockSpec, ModelSpec
from kizzasi.models.stems import Tokens

LAYER = "gpt_neox.layers.#."
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}


def _spec(config: Config, shapes: Shapes) -> ModelSpec:
    d, n_heads = config.get("hidden_size", int), config.get("num_attention_heads", int)
    theta, part = _rotation(config)
    bias = config.get("attention_bias", bool, True)
    head = d // max(1, n_heads)
    mixer = AttentionSpec(
        n_heads=n_heads,
        rope_theta=theta,
        rope_dims=None if part == 1 else int(head * part),
        qkv_bias=bias,
        out_bias=bias,
    )
    channel = MLPSpec(
        config.get("intermediate_size", int, 4 * d),
        config.choose("hidden_act", ACTIVATIONS, "gelu"),
        bias=True,
    )
    beside = config.get("use_parallel_residual", bool, True)
    block = BlockSpec(mixer, channel, "layer", parallel="separate" if beside else None)
    config.skip("max_position_embeddings", "classifier_dropout")  # a note; of another head
    return ModelSpec(
        d_model=d,
        blocks=(block,) * depth(config, shapes),
        stem=Tokens(config.get("vocab_size", int)),
        norm="layer",
        norm_eps=config.get("layer_norm_eps", float, 1e-5),
        tie_head=config.get("tie_word_embeddings", bool, False),
        dropout=config.get("hidden_dropout", float, 0.0),
    )


def _rotation(config: Config) -> tuple[float, float]:
    """Base of the frequencies, and the part of every head that turns."""
    config.only("rope_scaling")
    theta = config.get("rotary_emb_base", float, config.get("rope_theta", float, 1e4))
    part = config.get("rotary_pct", float, config.get("partial_rotary_factor", float, 0.25))
    keys = config.within("rope_parameters")
    if keys is None:
        return theta, part
    keys.only("rope_type", "default")
    theta = keys.get("rope_theta", float, theta)
    part = keys.get("partial_rotary_factor", float, part)
    keys.finish()
    return theta, part


def _keys(spec: ModelSpec) -> dict[str, Any]:
    mixer, block = first(spec), spec.plain_blocks[0]
    if not isinstance(block.channel, MLPSpec) or mixer.kv_heads != mixer.n_heads:
        raise SpecError("GPT-NeoX has MLP channels, and as many key heads as query heads")
    head = mixer.width(spec.d_model)
    theirs = {ours: key for key, ours in reversed(ACTIVATIONS.items())}
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": vocabulary(spec).vocab_size,
        "hidden_size": spec.d_model,
        "num_hidden_layers": len(spec.blocks),
        "intermediate_size": block.channel.width(spec.d_model),
        "num_attention_heads": mixer.n_heads,
        "hidden_act": theirs.get(block.channel.activation),
        "rotary_pct": (mixer.rope_dims or head) / head,
        "rotary_emb_base": mixer.rope_theta,
        "use_parallel_residual": block.parallel is not None,
        "attention_bias": mixer.qkv_bias,
        "layer_norm_eps": spec.norm_eps,
        "hidden_dropout": spec.dropout,
        "tie_word_embeddings": spec.tie_head,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _by_head(n_heads: int) -> Form:
    """All queries, all keys and all values, against the three of every head."""

    def write(ours: list[Tensor]) -> list[Tensor]:
        return [torch.cat([t.unflatten(0, (n_heads, -1)) for t in ours], 1).flatten(0, 1)]

    def read(theirs: list[Tensor], shapes: list[torch.Size]) -> list[Tensor]:
        return [t.flatten(0, 1) for t in theirs[0].unflatten(0, (n_heads, -1)).chunk(3, 1)]

    return Form(write, read)


def _layouts(spec: ModelSpec) -> Sequence[Rules]:
    qkv = [f"blocks.#.mixer.{part}_proj.@" for part in "qkv"]
    table = {
        "stem.embedding.@": "gpt_neox.embed_in.@",
        "stem.lm_head.@": "embed_out.@",
        "norm.@": "gpt_neox.final_layer_norm.@",
        "blocks.#.mixer_norm.@": LAYER + "input_layernorm.@",
        "blocks.#.channel_norm.@": LAYER + "post_attention_layernorm.@",
        "blocks.#.mixer.o_proj.@": LAYER + "attention.dense.@",
        "blocks.#.channel.up_proj.@": LAYER + "mlp.dense_h_to_4h.@",
        "blocks.#.channel.down_proj.@": LAYER + "mlp.dense_4h_to_h.@",
    }
    form = _by_head(first(spec).n_heads)
    return [[*renamed(table), Rule(qkv, LAYER + "attention.query_key_value.@", form)]]


GPT_NEOX = register(
    Family(
        "gpt_neox",
        _spec,
        _layouts,
        _keys,
        ignored=tuple(
            f"{LAYER}attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
        ),
        tied=("embed_out.weight", "gpt_neox.embed_in.weight"),
        canonical=canonical,
    )
)
