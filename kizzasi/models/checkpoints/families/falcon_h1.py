"""Falcon-H1, as transformers stores it: Mamba-2 and attention read the same norm side by side.

Factors of embeddings and logits are the spec's. All others are of outputs of linear maps: they are
multiplied into the weights in reading (in at least float32), and what is written says 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kizzasi.errors import SpecError
from kizzasi.models.channels.swiglu import SwiGLUSpec
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.families import llama
from kizzasi.models.checkpoints.families.bamba import mamba_keys, mamba_of
from kizzasi.models.checkpoints.families.jamba import TRUNK
from kizzasi.models.checkpoints.families.mamba_hf import (
    PARTS,
    d_model_of,
    only_mixer,
    without_steps,
)
from kizzasi.models.checkpoints.foreign import Family, register
from kizzasi.models.checkpoints.names import renamed
from kizzasi.models.checkpoints.storage.stored import Shapes, Storage, Stored
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.mamba2 import Mamba2Spec
from kizzasi.models.mixers.parallel import ParallelSpec
from kizzasi.models.ops.precision import full_precision
from kizzasi.models.spec import BlockSpec, ModelSpec

MAMBA, HEADS = "blocks.#.mixer.mixers.0.", "blocks.#.mixer.mixers.1."
NAMES = {
    **{ours: name for ours, name in TRUNK.items() if ".mixer." not in ours},
    MAMBA + "@": llama.LAYER + "mamba.@",
    **{f"{MAMBA}{part}.@": f"{llama.LAYER}mamba.{part}.@" for part in PARTS},
    **{f"{HEADS}{x}_proj.@": f"{llama.LAYER}self_attn.{x}_proj.@" for x in "qkvo"},
}
FACTORS = [f"{x}_multiplier" for x in ("key", "attention_in", "attention_out", "ssm_in", "ssm_out")]


def _spec(config: Config, shapes: Shapes) -> ModelSpec:
    n_layers, d_model = llama.depth(config, shapes), d_model_of(config, shapes)
    bias = config.get("attention_bias", bool, False)
    heads = replace(llama.attention(config, n_kv_heads=8), qkv_bias=bias, out_bias=bias)
    mamba = mamba_of(config, d_model, config.get("mamba_d_ssm", int, 1024, null=None))
    config.only("projectors_bias", mamba.bias)
    mamba = replace(mamba, rms_norm=config.get("mamba_rms_norm", bool, False))
    before = config.get("mamba_norm_before_gate", bool, True)
    mamba = replace(mamba, norm_before_gate=before and mamba.rms_norm)
    channel = llama.swiglu(config, bias=config.get("mlp_bias", bool, False))
    for factor in FACTORS:
        config.get(factor, float, 1.0)
    for name, n in (("mlp_multipliers", 2), ("ssm_multipliers", 5)):
        given = config.get(name, tuple[float, ...], (1.0,) * n)
        if len(given) != n:
            config.refuse(name, f"{len(given)} numbers; {n} are needed")
    config.skip("num_logits_to_keep", "mamba_use_mlp", "mamba_chunk_size")  # of the output; speed
    config.skip("layers_block_type", "layer_types")  # "hybrid", all of them
    block = BlockSpec(ParallelSpec((mamba, heads)), channel)
    return llama.trunk(config, [block] * n_layers, 1e-5).replace(
        embed_scale=config.get("embedding_multiplier", float, 1.0),
        logit_scale=config.get("lm_head_multiplier", float, 1.0),
    )


def _parts(spec: ModelSpec) -> tuple[Mamba2Spec, AttentionSpec]:
    mixers = only_mixer(spec, ParallelSpec).mixers
    if [type(mixer) for mixer in mixers] != [Mamba2Spec, AttentionSpec]:
        kinds = ", ".join(mixer.kind for mixer in mixers)
        raise SpecError(f"blocks[0].mixer.mixers: {kinds}; the format knows mamba2, attention")
    return mixers  # pyright: ignore[reportReturnType]


def _keys(spec: ModelSpec) -> dict[str, Any]:
    mamba, heads = _parts(spec)
    channel = spec.plain_blocks[0].channel
    alone = tuple(replace(block, mixer=heads) for block in spec.plain_blocks)
    return {
        "architectures": ["FalconH1ForCausalLM"],
        "model_type": "falcon_h1",
        **llama.heads(spec.replace(blocks=alone)),
        **mamba_keys(mamba, spec.d_model),
        "mamba_d_ssm": mamba.n_heads(spec.d_model) * mamba.head_dim,
        "mamba_rms_norm": mamba.rms_norm,
        "mamba_norm_before_gate": mamba.norm_before_gate,
        "projectors_bias": mamba.bias,
        "attention_bias": heads.qkv_bias,
        "mlp_bias": isinstance(channel, SwiGLUSpec) and channel.bias,
        "embedding_multiplier": spec.embed_scale,
        "lm_head_multiplier": spec.logit_scale,
    }


def _canonical(spec: ModelSpec) -> ModelSpec:
    """Of both mixers, as if each were alone; a norm that is not there is not before the gate."""
    blocks = []
    for block in spec.plain_blocks:
        mixers = block.mixer.mixers if isinstance(block.mixer, ParallelSpec) else (block.mixer,)
        parts = tuple(replace(block, mixer=mixer) for mixer in mixers)
        parts = without_steps(spec.replace(blocks=parts)).plain_blocks
        whole = parts[0].mixer
        if isinstance(block.mixer, ParallelSpec):
            whole = replace(block.mixer, mixers=tuple(_gated(part.mixer) for part in parts))
        blocks.append(replace(parts[0], mixer=whole))
    return spec.replace(blocks=tuple(blocks))


def _gated(mixer: Any) -> Any:
    plain = isinstance(mixer, Mamba2Spec) and not mixer.rms_norm
    return replace(mixer, norm_before_gate=False, norm_eps=1e-5) if plain else mixer


def _folded(data: Mapping[str, Any], spec: ModelSpec, storage: Storage) -> Storage:
    mamba, _ = _parts(spec)
    key, enter, leave, ssm_enter, ssm_leave = (data.get(name) or 1.0 for name in FACTORS)
    gate, down = data.get("mlp_multipliers") or (1.0, 1.0)
    inner, n = mamba.n_heads(spec.d_model) * mamba.head_dim, mamba.n_groups * mamba.d_state
    sizes = torch.tensor([inner, inner, n, n, mamba.n_heads(spec.d_model)])
    factors = torch.tensor(data.get("ssm_multipliers") or (1.0,) * 5, dtype=torch.float64)
    rows = factors.repeat_interleave(sizes)
    table: dict[str, Any] = {
        **{f"self_attn.{x}_proj.weight": enter for x in "qv"},
        "self_attn.k_proj.weight": enter * key,
        "self_attn.k_proj.bias": key,
        "mamba.in_proj.weight": ssm_enter * rows[:, None],
        "mamba.in_proj.bias": rows,
        **{f"self_attn.o_proj.{leaf}": leave for leaf in ("weight", "bias")},
        **{f"mamba.out_proj.{leaf}": ssm_leave for leaf in ("weight", "bias")},
        **{f"feed_forward.gate_proj.{leaf}": gate for leaf in ("weight", "bias")},
        **{f"feed_forward.down_proj.{leaf}": down for leaf in ("weight", "bias")},
    }

    def changed(name: str, stored: Stored) -> Stored:
        factor = table.get(re.sub(r"^model\.layers\.\d+\.", "", name), 1.0)
        if torch.as_tensor(factor).eq(1).all():
            return stored
        return stored._replace(read=_times(stored.read, factor))

    return {name: changed(name, stored) for name, stored in storage.items()}


def _times(read: Callable[[], Tensor], factor: Any) -> Callable[[], Tensor]:
    def product() -> Tensor:
        values = full_precision(read())
        return values * torch.as_tensor(factor, dtype=values.dtype)

    return product


FALCON_H1 = register(
    Family(
        "falcon_h1",
        _spec,
        lambda _: [renamed(NAMES)],
        _keys,
        ignored=llama.ROTARY_BUFFERS,
        tied=llama.TIED,
        canonical=_canonical,
        folded=_folded,
    )
)
