"""xLSTM-7B, as transformers stores it: mLSTM layers and gated channels, capped logits.

Projections are stored one by one ("single") or fused; both are read, and the first is written.
"""

from __future__ import annotations

from typing import Any

from kizzasi.models.channels.moe import PARTS
from kizzasi.models.channels.swiglu import SwiGLUSpec
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.families import llama
from kizzasi.models.checkpoints.families.mamba_hf import d_model_of, only_mixer
from kizzasi.models.checkpoints.foreign import Family, Rules, register
from kizzasi.models.checkpoints.names import CONCATENATED, Rule, renamed
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.mixers.mlstm import MLSTMSpec
from kizzasi.models.spec import BlockSpec, ModelSpec

LAYER = "backbone.blocks.#."
OURS, MIX = "blocks.#.mixer.", LAYER + "mlstm_layer."
TRUNK = {
    "stem.embedding.@": "backbone.embeddings.@",
    "stem.lm_head.@": "lm_head.@",
    "norm.@": "backbone.out_norm.@",
    "blocks.#.mixer_norm.@": LAYER + "norm_mlstm.@",
    "blocks.#.channel_norm.@": LAYER + "norm_ffn.@",
    OURS + "head_norm.@": MIX + "multihead_norm.@",
    OURS + "out_proj.@": MIX + "out_proj.@",
    "blocks.#.channel.down_proj.@": LAYER + "ffn.proj_down.@",
}
SINGLE = {
    **{f"{OURS}{x}_proj.@": f"{MIX}{x}.@" for x in "qkv"},
    **{f"{OURS}{x}_gate.@": f"{MIX}{x}gate_preact.@" for x in "oif"},
    "blocks.#.channel.gate_proj.@": LAYER + "ffn.proj_up_gate.@",
    "blocks.#.channel.up_proj.@": LAYER + "ffn.proj_up.@",
}
FUSED = {
    MIX + "qkv_opreact.@": [f"{OURS}{x}.@" for x in ("q_proj", "k_proj", "v_proj", "o_gate")],
    MIX + "ifgate_preact.@": [f"{OURS}{x}_gate.@" for x in "if"],
    LAYER + "ffn.proj_up_gate_z.@": [f"blocks.#.channel.{part}.@" for part in PARTS[:2]],
}
SPEED = (
    *("chunkwise_kernel", "sequence_kernel", "step_kernel", "mode", "chunk_size", "weight_mode"),
    *("return_last_states", "autocast_kernel_dtype", "inference_state_dtype"),
    *("norm_reduction_force_float32", "max_inference_chunksize"),
)


def _layouts(_: ModelSpec) -> list[Rules]:
    fused = [Rule(ours, theirs, CONCATENATED) for theirs, ours in FUSED.items()]
    return [renamed(TRUNK | SINGLE), [*fused, *renamed(TRUNK)]]


def _spec(config: Config, shapes: Shapes) -> ModelSpec:
    key = "hidden_size" if config.data.get("hidden_size") else "embedding_dim"
    d_model = d_model_of(config, shapes, key)
    for name in ("hidden_size", "embedding_dim"):
        config.only(name, d_model)
    n_layers = config.count("num_blocks", len(shapes), config.data.get("num_hidden_layers"))
    config.only("num_hidden_layers", n_layers)
    config.only("use_bias", False)
    config.only("add_out_norm", True)
    config.only("eps", 1e-6)
    config.skip(*SPEED)
    config.skip("tie_word_embeddings")  # transformers never ties these
    multiple = config.get("ffn_round_up_to_multiple_of", int, 64)
    if multiple < 1:
        config.refuse("ffn_round_up_to_multiple_of", f"{multiple} is below 1")
    hidden = d_model * config.get("ffn_proj_factor", float, 2.667)
    hidden = int((hidden + multiple - 1) // multiple) * multiple
    eps, n_heads = config.get("norm_eps", float, 1e-6), config.get("num_heads", int, 8)
    mixer = MLSTMSpec(
        n_heads=n_heads,
        expand_k=int(d_model * config.get("qk_dim_factor", float, 0.5)) / d_model,
        expand_v=int(d_model * config.get("v_dim_factor", float, 1.0)) / d_model,
        gate_cap=config.get("gate_soft_cap", float, 15.0),
        norm_eps=eps,
    )
    spec = ModelSpec(
        d_model=d_model,
        blocks=(BlockSpec(mixer, SwiGLUSpec(hidden)),) * n_layers,
        stem=llama.Tokens(config.get("vocab_size", int)),
        norm_eps=eps,
    )
    return spec.replace(logit_cap=config.get("output_logit_soft_cap", float, 30.0))


def _keys(spec: ModelSpec) -> dict[str, Any]:
    mixer, d_model = only_mixer(spec, MLSTMSpec), spec.d_model
    return {
        "architectures": ["xLSTMForCausalLM"],
        "model_type": "xlstm",
        "vocab_size": llama.vocabulary(spec).vocab_size,
        "hidden_size": d_model,
        "embedding_dim": d_model,
        "num_hidden_layers": len(spec.blocks),
        "num_blocks": len(spec.blocks),
        "num_heads": mixer.n_heads,
        "qk_dim_factor": mixer.expand_k,
        "v_dim_factor": mixer.expand_v,
        "ffn_proj_factor": (llama.width(spec) + 0.5) / d_model,  # what is beyond 1 is cut off
        "ffn_round_up_to_multiple_of": 1,
        "gate_soft_cap": mixer.gate_cap,
        "norm_eps": spec.norm_eps,
        "output_logit_soft_cap": spec.logit_cap,
        "weight_mode": "single",
        "tie_word_embeddings": False,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }


XLSTM = register(
    Family(
        "xlstm",
        _spec,
        _layouts,
        _keys,
        canonical=llama.canonical,
    )
)
