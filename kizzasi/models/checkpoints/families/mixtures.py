"""Mixtures of experts with Llama's trunk, as transformers stores them: mixtral, qwen3_moe, olmoe.

Experts are stored one by one; stacked, as transformers 5 holds them in memory, they are read too.

Differs: the balance loss of transformers is one for all layers together, ours one per layer. Ours
are weighted so that their sum is theirs when all layers are alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kizzasi.errors import SpecError
from kizzasi.models.channels.moe import PARTS, MoESpec
from kizzasi.models.channels.swiglu import SwiGLUSpec
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.experts import EACH, PAIRS
from kizzasi.models.checkpoints.experts import MIXTRAL as MIXTRAL_PARTS
from kizzasi.models.checkpoints.families.llama import (
    GATED,
    LAYER,
    TRUNK,
    attention,
    depth,
    dialect,
    first,
    heads,
    normalised,
    swiglu,
    trunk,
    used_window,
)
from kizzasi.models.checkpoints.foreign import Rules
from kizzasi.models.checkpoints.names import Rule, renamed
from kizzasi.models.checkpoints.storage.stored import Shapes, count_values
from kizzasi.models.spec import BlockSpec, ModelSpec

GATE = "blocks.#.channel.gate.weight"


def one_by_one(spec: ModelSpec, layer: str, names: Mapping[Any, str] | None = None) -> Rules:
    """Rules for experts that are stored one by one.

    Args:
        spec: of the model.
        layer: what stands before "experts" in their names, with "#" for the layer.
        names: of an expert's matrices; None means as in `PARTS`.
    """
    rules: list[Rule] = []
    for i, block in enumerate(spec.plain_blocks):
        if isinstance(block.channel, MoESpec):
            ours, theirs = f"blocks.{i}.channel.experts", layer.replace("#", str(i))
            gate, up, down = (
                [
                    f"{theirs}experts.{n}.{names[part] if names else part}.weight"
                    for n in range(block.channel.n_experts)
                ]
                for part in PARTS
            )
            rules.append(Rule(f"{ours}.gate_up_proj", (*gate, *up), PAIRS))
            rules.append(Rule(f"{ours}.down_proj", down, EACH))
    return rules


def stacked(layer: str) -> dict[str, str]:
    """Names of experts that are stored as we hold them; the argument is as in `one_by_one`."""
    return {
        f"blocks.#.channel.experts.{part}": f"{layer}experts.{part}"
        for part in ("gate_up_proj", "down_proj")
    }


def like_mixtral(spec: ModelSpec) -> list[Rules]:
    """The layouts of mixtral."""
    sparse = f"{LAYER}block_sparse_moe."
    each = one_by_one(spec, sparse, MIXTRAL_PARTS)
    first = [*renamed(TRUNK | GATED | {GATE: f"{sparse}gate.weight"}), *each]
    return [first, like_qwen(spec)[1]]


def like_qwen(spec: ModelSpec) -> list[Rules]:
    """The layouts of qwen3_moe, qwen3_next and olmoe."""
    mlp = f"{LAYER}mlp."
    names = TRUNK | GATED | {GATE: f"{mlp}gate.weight"}
    return [[*renamed(names), *one_by_one(spec, mlp)], renamed(names | stacked(mlp))]


def read_mixture(
    config: Config, shapes: Shapes, n_mixtures: int, *, hidden: int, experts: int, top_k: int
) -> MoESpec:
    """The channel; the keywords are what silence of the config means."""
    most = count_values(shapes) // n_mixtures  # an expert has at least one value in every layer
    old, new = (config.get(key, int, None) for key in ("num_experts", "num_local_experts"))
    if None not in (old, new) and old != new:
        config.refuse("num_experts", f"{old}, but num_local_experts is {new}")
    count = old or new or experts
    if not 1 <= count <= most:
        config.refuse("num_experts", f"{count} cannot be: the tensors allow 1 to {most}")
    top_k = config.get("num_experts_per_tok", int, top_k)
    weight = config.get("router_aux_loss_coef", float, 0.0) * top_k / n_mixtures
    config.only("hidden_act", "silu", "swish")
    config.skip("output_router_logits")  # of the output only
    return MoESpec(
        n_experts=count,
        top_k=top_k,
        hidden=hidden,
        jitter=config.get("router_jitter_noise", float, 0.0),
        balance_weight=float(f"{weight:.12g}"),  # so that both ways agree in the last digit
        z_loss_weight=0.0,
    )


def mixtures_of(spec: ModelSpec) -> list[MoESpec]:
    found = [b.channel for b in spec.plain_blocks if isinstance(b.channel, MoESpec)]
    if not found:
        raise SpecError("no block has a mixture of experts; use another format")
    return found


def mixture_keys(spec: ModelSpec) -> dict[str, Any]:
    mixtures = mixtures_of(spec)
    mixture = mixtures[0]
    return {
        "num_experts_per_tok": mixture.top_k,
        "router_aux_loss_coef": mixture.balance_weight * len(mixtures) / mixture.top_k,
    }


def expert_width(spec: ModelSpec) -> int:
    """Of an expert."""
    expert = mixtures_of(spec)[0].expert_specs(spec.d_model)[0]
    if not isinstance(expert, SwiGLUSpec):
        raise SpecError(f"an expert is {expert.kind}, and the format knows swiglu only")
    return expert.width(spec.d_model)


def _mixtral(config: Config, shapes: Shapes) -> ModelSpec:
    n_layers = depth(config, shapes)
    hidden = config.get("intermediate_size", int)
    channel = read_mixture(config, shapes, n_layers, hidden=hidden, experts=8, top_k=2)
    window = config.get("sliding_window", int, None)
    mixer = replace(attention(config, n_kv_heads=8, theta=1e6), window=window)
    return trunk(config, [BlockSpec(mixer, channel)] * n_layers, eps=1e-5)


def _mixtral_keys(spec: ModelSpec) -> dict[str, Any]:
    mixture = mixtures_of(spec)[0]
    return {
        **heads(spec),
        **mixture_keys(spec),
        "intermediate_size": expert_width(spec),
        "num_local_experts": mixture.n_experts,
        "router_jitter_noise": mixture.jitter,
        "sliding_window": first(spec).window,
    }


def mixed_layers(config: Config, n_layers: int) -> list[bool]:
    """Which layers of qwen3_moe and qwen3_next have experts."""
    every = config.get("decoder_sparse_step", int, 1)
    dense = set(config.get("mlp_only_layers", tuple[int, ...], ()))
    if every < 1:
        config.refuse("decoder_sparse_step", f"{every} is below 1")
    mixed = [i not in dense and (i + 1) % every == 0 for i in range(n_layers)]
    if not any(mixed):
        config.refuse("mlp_only_layers", "leave no mixture of experts; this is a qwen3")
    return mixed


def sparse_keys(spec: ModelSpec) -> dict[str, Any]:
    """What qwen3_moe and qwen3_next say of experts."""
    mixture, blocks = mixtures_of(spec)[0], enumerate(spec.plain_blocks)
    return {
        **mixture_keys(spec),
        "moe_intermediate_size": expert_width(spec),
        "num_experts": mixture.n_experts,
        "norm_topk_prob": mixture.normalize == "topk",
        "mlp_only_layers": [i for i, b in blocks if not isinstance(b.channel, MoESpec)],
        "decoder_sparse_step": 1,
    }


def _qwen3_moe(config: Config, shapes: Shapes) -> ModelSpec:
    mixed = mixed_layers(config, depth(config, shapes))
    hidden = config.get("moe_intermediate_size", int)
    mixture = read_mixture(config, shapes, sum(mixed), hidden=hidden, experts=128, top_k=8)
    norm = "topk" if config.get("norm_topk_prob", bool, False) else "all"
    sparse, channel = replace(mixture, normalize=norm), swiglu(config)
    config.skip("max_window_layers")  # of qwen3; this family does not read it
    mixer = normalised(attention(config, n_kv_heads=4), config)
    mixer = replace(mixer, window=used_window(config))
    return trunk(config, [BlockSpec(mixer, sparse if here else channel) for here in mixed])


def _qwen3_moe_keys(spec: ModelSpec) -> dict[str, Any]:
    window = first(spec).window
    return {
        **heads(spec),
        **sparse_keys(spec),
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "attention_bias": first(spec).qkv_bias,
    }


def _olmoe(config: Config, shapes: Shapes) -> ModelSpec:
    n_layers = depth(config, shapes)
    hidden = config.get("intermediate_size", int)
    mixture = read_mixture(config, shapes, n_layers, hidden=hidden, experts=64, top_k=8)
    norm = "topk" if config.get("norm_topk_prob", bool, False) else "all"
    mixer = normalised(attention(config), config, "full", eps=1e-5)
    mixer = replace(mixer, clip_qkv=config.get("clip_qkv", float, None))
    block = BlockSpec(mixer, replace(mixture, normalize=norm))
    return trunk(config, [block] * n_layers, eps=1e-5)


def _olmoe_keys(spec: ModelSpec) -> dict[str, Any]:
    mixture = mixtures_of(spec)[0]
    return {
        **heads(spec),
        **mixture_keys(spec),
        "intermediate_size": expert_width(spec),
        "num_experts": mixture.n_experts,
        "norm_topk_prob": mixture.normalize == "topk",
        "attention_bias": first(spec).qkv_bias,
        "clip_qkv": first(spec).clip_qkv,
    }


MIXTRAL = dialect("mixtral", "MixtralForCausalLM", _mixtral, _mixtral_keys, like_mixtral)
QWEN3_MOE = dialect("qwen3_moe", "Qwen3MoeForCausalLM", _qwen3_moe, _qwen3_moe_keys, like_qwen)
OLMOE = dialect("olmoe", "OlmoeForCausalLM", _olmoe, _olmoe_keys, like_qwen)
