"""GPT-2, as transformers stores it.

Its Linear layers are transposed (in, out), and queries, keys and values are one layer, c_attn.
OpenAI's own files have no "transformer." before the names, and causal masks among the tensors.
"""

from __future__ import annotations

from typing import Any, Literal

from kizzasi.errors import SpecError
from kizzasi.models.channels.mlp import MLPSpec
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.families.llama import canonical, first, vocabulary
from kizzasi.models.checkpoints.foreign import Family, Rules, register
from kizzasi.models.checkpoints.names import (
    CONCATENATED,
    CONCATENATED_TRANSPOSED,
    TRANSPOSED,
    Rule,
    renamed,
)
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.spec import BlockSpec, ModelSpec
from kizzasi.models.stems import Tokens

ACTIVATIONS: dict[str, Literal["gelu", "gelu_tanh", "relu", "silu"]] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}


def _spec(config: Config, shapes: Shapes) -> ModelSpec:
    hidden = config.get("n_inner", int, None)
    activation = config.choose("activation_function", ACTIVATIONS, "gelu_new")
    mixer = AttentionSpec(
        n_heads=config.get("n_head", int), position="none", qkv_bias=True, out_bias=True
    )
    block = BlockSpec(mixer, MLPSpec(hidden, activation, bias=True), norm="layer")
    config.only("scale_attn_weights", True)
    config.only("scale_attn_by_inverse_layer_idx", False)
    config.only("add_cross_attention", False)
    config.skip("reorder_and_upcast_attn")  # precision only
    config.skip("embd_pdrop", "attn_pdrop", "n_ctx")  # of training; a second name of n_positions
    config.skip(*(key for key in config.data if key.startswith("summary_")))  # of another head
    return ModelSpec(
        d_model=config.get("n_embd", int),
        blocks=(block,) * config.count("n_layer", len(shapes)),
        stem=Tokens(config.get("vocab_size", int), config.get("n_positions", int, 1024)),
        norm="layer",
        norm_eps=config.get("layer_norm_epsilon", float, 1e-5),
        tie_head=config.get("tie_word_embeddings", bool, True),
        dropout=config.get("resid_pdrop", float, 0.1),
    )


def _keys(spec: ModelSpec) -> dict[str, Any]:
    mixer, channel, stem = first(spec), spec.plain_blocks[0].channel, vocabulary(spec)
    if not isinstance(channel, MLPSpec) or stem.max_positions is None:
        raise SpecError("GPT-2 has MLP channels and learned positions, Tokens(max_positions)")
    theirs = {ours: key for key, ours in reversed(ACTIVATIONS.items())}
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": stem.vocab_size,
        "n_positions": stem.max_positions,
        "n_embd": spec.d_model,
        "n_layer": len(spec.blocks),
        "n_head": mixer.n_heads,
        "n_inner": channel.width(spec.d_model),
        "activation_function": theirs.get(channel.activation),
        "layer_norm_epsilon": spec.norm_eps,
        "resid_pdrop": spec.dropout,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": spec.tie_head,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _rules(prefix: str) -> Rules:
    qkv = [f"blocks.#.mixer.{part}_proj." for part in "qkv"]
    layer = f"{prefix}h.#."
    linears = {"mixer.o_proj": "attn.c_proj", "channel.up_proj": "mlp.c_fc"}
    linears["channel.down_proj"] = "mlp.c_proj"
    return [
        *renamed(
            {
                "stem.embedding.@": f"{prefix}wte.@",
                "stem.position_embedding.@": f"{prefix}wpe.@",
                "stem.lm_head.@": "lm_head.@",
                "norm.@": f"{prefix}ln_f.@",
                "blocks.#.mixer_norm.@": f"{layer}ln_1.@",
                "blocks.#.channel_norm.@": f"{layer}ln_2.@",
            }
        ),
        *renamed({f"blocks.#.{ours}.bias": f"{layer}{key}.bias" for ours, key in linears.items()}),
        *(
            Rule(f"blocks.#.{ours}.weight", f"{layer}{key}.weight", TRANSPOSED)
            for ours, key in linears.items()
        ),
        Rule(
            [f"{name}weight" for name in qkv], f"{layer}attn.c_attn.weight", CONCATENATED_TRANSPOSED
        ),
        Rule([f"{name}bias" for name in qkv], f"{layer}attn.c_attn.bias", CONCATENATED),
    ]


PREFIXES = ("transformer.", "")
GPT2 = register(
    Family(
        "gpt2",
        _spec,
        lambda _: [_rules(prefix) for prefix in PREFIXES],
        _keys,
        ignored=tuple(
            f"{prefix}h.#.attn.{name}" for prefix in PREFIXES for name in ("bias", "masked_bias")
        ),
        tied=("lm_head.weight", "transformer.wte.weight"),
        canonical=canonical,
    )
)
