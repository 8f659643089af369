"""gpt-oss, as transformers stores it: attention with sinks, windows in every other layer, and
mixtures of bounded gated channels whose projections and router have biases.

Of every expert, gates and ups take turns as columns of one matrix, inputs as its rows. Files in
MXFP4, as published, hold blocks instead; those are refused: transformers makes bfloat16 of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kizzasi.errors import SpecError
from kizzasi.models.attention.rope_scaling import RopeScaling
from kizzasi.models.channels.moe import PARTS, MoESpec
from kizzasi.models.channels.moe_routers import TopK
from kizzasi.models.channels.swiglu import SwiGLUSpec
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.families import llama, mixtures
from kizzasi.models.checkpoints.foreign import Rules
from kizzasi.models.checkpoints.names import Form, Rule, renamed
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.spec import BlockSpec, ModelSpec

ALPHA = 1.702  # of gelu_quick
MLP, OURS = llama.LAYER + "mlp.", "blocks.#.channel."
YARN = RopeScaling("yarn", 32.0, 4096, truncate=False)
NAMES = {
    **llama.TRUNK,
    "blocks.#.mixer.sinks": llama.LAYER + "self_attn.sinks",
    OURS + "gate.weight": MLP + "router.weight",
    OURS + "gate.logit_bias": MLP + "router.bias",
}


def _in_turns(ours: list[Tensor]) -> Tensor:
    """Gates of all experts, then ups, to (e, 2h, ...): the rows of both in turns."""
    gates, ups = (torch.stack(part) for part in (ours[: len(ours) // 2], ours[len(ours) // 2 :]))
    return torch.stack([gates, ups], 2).flatten(1, 2)


def _apart(theirs: Tensor) -> list[Tensor]:
    gates, ups = theirs.unflatten(1, (-1, 2)).unbind(2)
    return [*gates.unbind(), *ups.unbind()]


ENTER = Form(lambda ours: [_in_turns(ours).mT], lambda theirs, shapes: _apart(theirs[0].mT))
ENTER_BIAS = Form(lambda ours: [_in_turns(ours)], lambda theirs, shapes: _apart(theirs[0]))
LEAVE = Form(
    lambda ours: [torch.stack(ours).mT], lambda theirs, shapes: list(theirs[0].mT.unbind())
)
LEAVE_BIAS = Form(lambda ours: [torch.stack(ours)], lambda theirs, shapes: list(theirs[0].unbind()))


def _layouts(spec: ModelSpec) -> Sequence[Rules]:
    rules = renamed(NAMES)
    n = mixtures.mixtures_of(spec)[0].n_experts
    for part, enter, leave in (("weight", ENTER, LEAVE), ("bias", ENTER_BIAS, LEAVE_BIAS)):
        name = "" if part == "weight" else "_bias"
        pairs = [f"{OURS}experts.{i}.{p}.{part}" for p in PARTS[:2] for i in range(n)]
        downs = [f"{OURS}experts.{i}.{PARTS[2]}.{part}" for i in range(n)]
        rules.append(Rule(pairs, f"{MLP}experts.gate_up_proj{name}", enter))
        rules.append(Rule(downs, f"{MLP}experts.down_proj{name}", leave))
    return [rules]


def _spec(config: Config, shapes: Shapes) -> ModelSpec:
    n_layers = llama.depth(config, shapes)
    if config.data.get("quantization_config") is not None:
        rule = "weights in blocks are not supported; save them in bfloat16 by transformers"
        config.refuse("quantization_config", rule)
    usual = [llama.FULL if i % 2 else llama.LOCAL for i in range(n_layers)]
    slides = llama.layer_kinds(config, n_layers, usual, llama.SLIDES)
    window = config.get("sliding_window", int, 128, null=None)
    bias = config.get("attention_bias", bool, True)
    heads = llama.attention(config, n_kv_heads=8, head_dim=64, theta=1.5e5)
    if not {"rope_parameters", "rope_scaling"} & config.data.keys():
        heads = replace(heads, rope_scaling=YARN)
    heads = replace(heads, sinks=True, qkv_bias=bias, out_bias=bias)
    config.only("swiglu_alpha", ALPHA)
    config.skip("initial_context_length", "experts_per_token")  # notes
    expert = SwiGLUSpec(
        config.get("intermediate_size", int, 2880),
        bias=True,
        activation="gelu_quick",
        limit=config.get("swiglu_limit", float, 7.0),
        up_offset=1.0,
    )
    mixture = mixtures.read_mixture(config, shapes, n_layers, hidden=1, experts=128, top_k=4)
    experts = (expert,) * rows_of_router(config, shapes, "mlp.router", mixture.n_experts)
    mixture = replace(mixture, hidden=None, experts=experts, router=TopK(logit_bias=True))
    blocks = [BlockSpec(replace(heads, window=window if s else None), mixture) for s in slides]
    return llama.trunk(config, blocks, 1e-5)


def rows_of_router(config: Config, shapes: Shapes, name: str, n_experts: int) -> int:
    """So many experts, if a router knows them: they are listed, so a lie would cost memory."""
    known = {s[0] for key, s in shapes.items() if key.endswith(f"{name}.weight") and s}
    if known and known != {n_experts}:
        config.refuse("num_local_experts", f"{n_experts}, but routers know {sorted(known)}")
    return n_experts if known else 1


def _keys(spec: ModelSpec) -> dict[str, Any]:
    mixture = mixtures.mixtures_of(spec)[0]
    expert = mixture.expert_specs(spec.d_model)[0]
    if not isinstance(expert, SwiGLUSpec) or not isinstance(mixture, MoESpec):
        raise SpecError(f"an expert is {expert.kind}, and the format knows swiglu only")
    return {
        **llama.heads(spec),
        **llama.window_keys(spec),
        **mixtures.mixture_keys(spec),
        "num_local_experts": mixture.n_experts,
        "intermediate_size": expert.width(spec.d_model),
        "attention_bias": llama.first(spec).qkv_bias,
        "swiglu_limit": expert.limit,
    }


GPT_OSS = llama.dialect("gpt_oss", "GptOssForCausalLM", _spec, _keys, _layouts)
