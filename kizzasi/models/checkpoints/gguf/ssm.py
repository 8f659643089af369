"""Mamba, Mamba-2 and Jamba in GGUF.

A is stored as -exp(A_log), the convolution without its middle dimension, numbers per head as
columns, the norm of Mamba-2's output by groups, and Jamba's experts stacked. Jamba is read only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.families.jamba import period_keys
from kizzasi.models.checkpoints.families.mamba_hf import only_mixer, without_steps
from kizzasi.models.checkpoints.foreign import FAMILIES, Family, Rules
from kizzasi.models.checkpoints.gguf.llama import NAMES as LLAMA_NAMES
from kizzasi.models.checkpoints.gguf.words import (
    COMMON,
    TIED,
    metadata_of,
    spec_of_words,
    words_of,
)
from kizzasi.models.checkpoints.names import Form, Rule, renamed
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.mixers.mamba import MambaSpec
from kizzasi.models.mixers.mamba2 import Mamba2Spec
from kizzasi.models.spec import ModelSpec

SHARED = COMMON | {
    "ssm.state_size": "state_size",
    "ssm.conv_kernel": "conv_kernel",
    "ssm.inner_size": "intermediate_size",
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
}
KEYS = {
    "mamba": SHARED | {"ssm.time_step_rank": "time_step_rank"},
    "mamba2": SHARED | {"ssm.time_step_rank": "num_heads", "ssm.group_count": "n_groups"},
}
NONE = dict.fromkeys(("feed_forward_length", "attention.head_count"), 0)
OURS = "blocks.#.mixer."
NAMES = {
    "stem.embedding.@": "token_embd.@",
    "stem.lm_head.@": "output.@",
    "norm.@": "output_norm.@",
    "blocks.#.mixer_norm.@": "blk.#.attn_norm.@",
    OURS + "in_proj.weight": "blk.#.ssm_in.weight",
    OURS + "conv1d.bias": "blk.#.ssm_conv1d.bias",
    OURS + "out_proj.weight": "blk.#.ssm_out.weight",
}
MAMBA = {
    OURS + "D": "blk.#.ssm_d",
    OURS + "x_proj.weight": "blk.#.ssm_x.weight",
    OURS + "dt_proj.@": "blk.#.ssm_dt.@",
}
JAMBA = {
    **LLAMA_NAMES,
    **NAMES,
    **MAMBA,
    **{f"{OURS}{x}_layernorm.@": f"blk.#.ssm_{x}_norm.@" for x in ("dt", "b", "c")},
    "blocks.#.channel.gate.weight": "blk.#.ffn_gate_inp.weight",
    "blocks.#.channel.experts.down_proj": "blk.#.ffn_down_exps.weight",
}


def _shaped(change: Any, back: Any = lambda t: t) -> Form:
    """A function of ours and its inverse, then our shape."""

    def read(theirs: list[Tensor], shapes: list[torch.Size]) -> list[Tensor]:
        return [back(t).reshape(s) for t, s in zip(theirs, shapes, strict=True)]

    return Form(lambda ours: [change(t) for t in ours], read)


def _log(a: Tensor) -> Tensor:
    return torch.log(-a)


CONV = Rule(OURS + "conv1d.weight", "blk.#.ssm_conv1d.weight", _shaped(lambda t: t.squeeze(1)))
DECAY = Rule(OURS + "A_log", "blk.#.ssm_a", _shaped(lambda t: -t.exp(), _log))
EXPERTS = Rule(
    "blocks.#.channel.experts.gate_up_proj",
    [f"blk.#.ffn_{part}_exps.weight" for part in ("gate", "up")],
    Form(lambda ours: list(ours[0].chunk(2, 1)), lambda theirs, shapes: [torch.cat(theirs, 1)]),
)


def _mamba(config: Config, shapes: Shapes) -> ModelSpec:
    words = _words("mamba", config, shapes)
    config.only("ssm.dt_b_c_rms", False)
    config.only("ssm.group_count", 0)
    return spec_of_words("mamba", config, words, shapes)


def _mamba2(config: Config, shapes: Shapes) -> ModelSpec:
    words = _words("mamba2", config, shapes)
    words["head_dim"] = words["intermediate_size"] // max(words["num_heads"], 1)
    return spec_of_words("mamba2", config, words, shapes)


def _words(name: str, config: Config, shapes: Shapes) -> dict[str, Any]:
    words = words_of(config, shapes, KEYS[name])
    words["expand"] = words["intermediate_size"] // max(words["hidden_size"], 1)
    for key in (*NONE, "attention.head_count_kv"):
        config.only(key, 0)
    return words


def _jamba(config: Config, shapes: Shapes) -> ModelSpec:
    names = {
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "ssm.state_size": "mamba_d_state",
        "ssm.conv_kernel": "mamba_d_conv",
        "ssm.time_step_rank": "mamba_dt_rank",
    }
    words = words_of(config, shapes, COMMON | names)
    inner, n_experts = config.get("ssm.inner_size", int), config.get("expert_count", int, 0)
    words["mamba_expand"] = inner // max(words["hidden_size"], 1)
    words["num_experts"] = n_experts or 1
    words["num_experts_per_tok"] = config.get("expert_used_count", int, 0) or 1
    n_layers = len(shapes)  # more than there can be
    kv = config.get("attention.head_count_kv", tuple[int, ...])
    if len(kv) != words["num_hidden_layers"] or len(kv) > n_layers:
        config.refuse("attention.head_count_kv", f"{len(kv)} numbers, not one for each layer")
    words["num_key_value_heads"] = max(kv)
    words |= period_keys("attn", [n > 0 for n in kv])
    mixed = [f"blk.{i}.ffn_gate_inp.weight" in shapes for i in range(len(kv))]
    words |= period_keys("expert", mixed)
    return spec_of_words("jamba", config, words, shapes)


def _mamba_rules(spec: ModelSpec) -> Sequence[Rules]:
    return [[CONV, DECAY, *renamed(NAMES | MAMBA)]]


def _mamba2_rules(spec: ModelSpec) -> Sequence[Rules]:
    groups = only_mixer(spec, Mamba2Spec).n_groups
    column = _shaped(lambda t: t[:, None])
    grouped = _shaped(lambda t: t.unflatten(0, (groups, -1)))
    return [
        [
            CONV,
            Rule(OURS + "A_log", "blk.#.ssm_a", _shaped(lambda t: -t.exp()[:, None], _log)),
            Rule(OURS + "D", "blk.#.ssm_d", column),
            Rule(OURS + "norm.weight", "blk.#.ssm_norm.weight", grouped),
            *renamed(NAMES | {OURS + "dt_bias": "blk.#.ssm_dt.bias"}),
        ]
    ]


def _mamba_metadata(spec: ModelSpec) -> dict[str, Any]:
    only_mixer(spec, MambaSpec)
    data = metadata_of(FAMILIES["mamba"], spec, KEYS["mamba"])
    return {**data, **NONE, "ssm.dt_b_c_rms": False}


def _mamba2_metadata(spec: ModelSpec) -> dict[str, Any]:
    mixer = only_mixer(spec, Mamba2Spec)
    keys = dict(KEYS["mamba2"])
    del keys["ssm.inner_size"]
    inner = mixer.n_heads(spec.d_model) * mixer.head_dim
    data = metadata_of(FAMILIES["mamba2"], spec, keys)
    return {**data, **NONE, "ssm.inner_size": inner}


def _family(name: str, spec: Any, rules: Any, metadata: Any) -> Family:
    return Family(name, spec, rules, metadata, tied=TIED, canonical=without_steps)


STATE_SPACES = {
    "mamba": _family("mamba", _mamba, _mamba_rules, _mamba_metadata),
    "mamba2": _family("mamba2", _mamba2, _mamba2_rules, _mamba2_metadata),
    "jamba": _family("jamba", _jamba, lambda _: [[CONV, DECAY, EXPERTS, *renamed(JAMBA)]], None),
}
