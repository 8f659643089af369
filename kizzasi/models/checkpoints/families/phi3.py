"""Phi-3 and Phi-4-mini, as transformers stores them: Llama whose projections are stored fused, and
of whose heads a part may turn.

Stretched positions (longrope, the 128k models) are refused: which of two lists of frequencies is
used depends on the length of the input there, and a spec has one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kizzasi.models.channels.moe import PARTS
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.families.llama import (
    GATED,
    LAYER,
    TRUNK,
    attention,
    depth,
    dialect,
    first,
    heads,
    swiglu,
    trunk,
)
from kizzasi.models.checkpoints.names import CONCATENATED, Rule, renamed
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.spec import BlockSpec, ModelSpec

RULES = [
    Rule(
        [f"blocks.#.mixer.{q}_proj.weight" for q in "qkv"],
        f"{LAYER}self_attn.qkv_proj.weight",
        CONCATENATED,
    ),
    Rule(
        [f"blocks.#.channel.{part}.weight" for part in PARTS[:2]],
        f"{LAYER}mlp.gate_up_proj.weight",
        CONCATENATED,
    ),
    *renamed(TRUNK | GATED),
]


def _spec(config: Config, shapes: Shapes) -> ModelSpec:
    window = config.get("sliding_window", int, None)
    block = BlockSpec(replace(attention(config, rotated=1.0), window=window), swiglu(config))
    config.skip("original_max_position_embeddings", "embd_pdrop")  # of longrope; of training
    spec = trunk(config, [block] * depth(config, shapes), eps=1e-5)
    return replace(spec, dropout=config.get("resid_pdrop", float, 0.0))


def _keys(spec: ModelSpec) -> dict[str, Any]:
    mixer = first(spec)
    width = mixer.width(spec.d_model)
    return {
        **heads(spec),
        "sliding_window": mixer.window,
        "partial_rotary_factor": (mixer.rope_dims or width) / width,
        "resid_pdrop": spec.dropout,
    }


PHI3 = dialect("phi3", "Phi3ForCausalLM", _spec, _keys, lambda _: [RULES])
