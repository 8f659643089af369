"""Llama, Qwen 2 and Qwen 3 in GGUF.

llama.cpp turns pairs of neighbours and has the rows of Llama's queries and keys in that order.
Llama 3's stretched positions are stored as the number that divides each frequency; see model.py.
"""

from __future__ import annotations

from typing import Any

from kizzasi.errors import SpecError
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.families.llama import canonical, first, vocabulary
from kizzasi.models.checkpoints.foreign import FAMILIES, Family, Rules
from kizzasi.models.checkpoints.gguf.words import (
    COMMON,
    TIED,
    metadata_of,
    spec_of_words,
    words_of,
)
from kizzasi.models.checkpoints.names import Rule, interleaved, renamed
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.spec import ModelSpec

KEYS = COMMON | {
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
OURS = "blocks.#.mixer."
NAMES = {
    "stem.embedding.@": "token_embd.@",
    "stem.lm_head.@": "output.@",
    "norm.@": "output_norm.@",
    "blocks.#.mixer_norm.@": "blk.#.attn_norm.@",
    "blocks.#.channel_norm.@": "blk.#.ffn_norm.@",
    OURS + "o_proj.@": "blk.#.attn_output.@",
    **{f"{OURS}{x}_proj.@": f"blk.#.attn_{x}.@" for x in "qkv"},
    **{f"{OURS}{x}_norm.@": f"blk.#.attn_{x}_norm.@" for x in "qk"},
    **{f"blocks.#.channel.{x}_proj.@": f"blk.#.ffn_{x}.@" for x in ("gate", "up", "down")},
}


def _spec(name: str, config: Config, shapes: Shapes) -> ModelSpec:
    words = words_of(config, shapes, KEYS)
    n_heads = words["num_attention_heads"]
    usual = words["hidden_size"] // max(n_heads, 1)
    width = config.get("attention.key_length", int, usual)
    config.only("attention.value_length", width)
    config.only("rope.dimension_count", width)
    config.only("expert_count", 0)
    config.only("expert_used_count", 0)
    config.skip("rope.scaling.finetuned")  # a note
    words["head_dim"] = width
    words["num_key_value_heads"] = config.get("attention.head_count_kv", int, n_heads)
    words["rope_theta"] = config.get("rope.freq_base", float, 1e4)
    if name == "llama":
        words["attention_bias"] = "blk.0.attn_q.bias" in shapes
    kind = config.get("rope.scaling.type", str, "none")
    if kind == "linear":
        factor = config.get("rope.scaling.factor", float)
        words["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind != "none":
        rule = f"{kind!r:.40} is not supported; only none and linear are"
        config.refuse("rope.scaling.type", rule)
    return spec_of_words(name, config, words, shapes)


def _metadata(name: str, spec: ModelSpec) -> dict[str, Any]:
    mixer, vocab_size = first(spec), vocabulary(spec).vocab_size
    width, scaling = mixer.width(spec.d_model), mixer.rope_scaling
    lengths = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    data = {
        **metadata_of(FAMILIES[name], spec, KEYS),
        "attention.head_count_kv": mixer.kv_heads,
        "rope.freq_base": mixer.rope_theta,
        "vocab_size": vocab_size,
        **dict.fromkeys(lengths, width),
    }
    if scaling is None:
        return data
    if scaling.method != "linear":
        raise SpecError(f"rope_scaling.method is {scaling.method!r}; GGUF says linear and llama3")
    return {**data, "rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}


def _layouts(name: str, spec: ModelSpec) -> list[Rules]:
    form = interleaved(first(spec).width(spec.d_model))
    pairs = [Rule(f"{OURS}{x}_proj.@", f"blk.#.attn_{x}.@", form) for x in "qk"]
    return [[*(pairs if name == "llama" else ()), *renamed(NAMES)]]


def _family(name: str) -> Family:
    return Family(
        name,
        lambda config, shapes: _spec(name, config, shapes),
        lambda spec: _layouts(name, spec),
        lambda spec: _metadata(name, spec),
        tied=TIED,
        canonical=canonical,
    )


LIKE_LLAMA = {name: _family(name) for name in ("llama", "qwen2", "qwen3")}
