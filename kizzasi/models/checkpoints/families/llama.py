"""Llama and its dialects, as transformers stores them: llama, mistral, qwen2, qwen3.

| dialect | what it adds to Llama |
|---|---|
| llama | biases of all four projections if attention_bias, of the channel if mlp_bias |
| mistral | a window |
| qwen2 | biases of q_proj, k_proj, v_proj; a window in the upper layers |
| qwen3 | normalised queries and keys; biases of all four if attention_bias; windows as in qwen2 |

Rotary positions are read from `rope_theta` and `rope_scaling`, or from `rope_parameters`, their
form since transformers 5; they are written in the older form, which every version reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeVar

from kizzasi.errors import SpecError
from kizzasi.models.attention.rope_scaling import RopeScaling
from kizzasi.models.channels.mlp import MLPSpec
from kizzasi.models.channels.moe import MoESpec
from kizzasi.models.channels.swiglu import SwiGLUSpec
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.foreign import Family, Rules, register
from kizzasi.models.checkpoints.names import renamed
from kizzasi.models.checkpoints.storage.stored import Shapes
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.spec import BlockSpec, ModelSpec
from kizzasi.models.stems import Tokens

T = TypeVar("T")
LAYER = "model.layers.#."
TRUNK = {
    "stem.embedding.@": "model.embed_tokens.@",
    "stem.lm_head.@": "lm_head.@",
    "norm.@": "model.norm.@",
    "blocks.#.mixer_norm.@": LAYER + "input_layernorm.@",
    "blocks.#.channel_norm.@": LAYER + "post_attention_layernorm.@",
    **{
        f"blocks.#.mixer.{part}.@": f"{LAYER}self_attn.{part}.@"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    },
}
GATED = {
    f"blocks.#.channel.{part}.@": f"{LAYER}mlp.{part}.@"
    for part in ("gate_proj", "up_proj", "down_proj")
}
ROTARY_BUFFERS = (LAYER + "self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
TIED = ("lm_head.weight", "model.embed_tokens.weight")
EPS = "rms_norm_eps"
FULL, LOCAL = "full_attention", "sliding_attention"
SLIDES = {FULL: False, LOCAL: True}
# Our name of a field of RopeScaling, and theirs, by rope_type.
STRETCH = {"factor": "factor", "original_context": "original_max_position_embeddings"}
SCALINGS = {
    "linear": {"factor": "factor"},
    "yarn": STRETCH | {key: key for key in ("beta_fast", "beta_slow", "attention_factor")},
    "llama3": STRETCH | {key: key for key in ("low_freq_factor", "high_freq_factor")},
}


class Positions(NamedTuple):
    """Base, scaling, and the part of every head that turns."""

    theta: float
    scaling: RopeScaling | None
    part: float


def trunk(
    config: Config,
    blocks: Sequence[BlockSpec],
    eps: float = 1e-6,
    *,
    key: str = EPS,
    tied: bool = False,
) -> ModelSpec:
    """The model around its blocks, the final norm of their kind.

    eps, tied are what silence of the config means, and `key` is its name of eps.
    """
    return ModelSpec(
        d_model=config.get("hidden_size", int),
        blocks=tuple(blocks),
        stem=Tokens(config.get("vocab_size", int)),
        norm=blocks[0].norm,
        norm_eps=config.get(key, float, eps),
        tie_head=config.get("tie_word_embeddings", bool, tied),
    )


def attention(
    config: Config,
    n_kv_heads: int | None = None,
    head_dim: int | None = None,
    theta: float = 1e4,
    rotated: float | None = None,
    rope: Positions | None = None,
) -> AttentionSpec:
    """Heads and rotary positions; the arguments are what silence of the config means.

    `rotated` is the part of every head that turns; None: the whole of it, in this family always.
    `rope` is what was read of the positions already.
    """
    theta, scaling, part = rope or _rope(config, theta, rotated)
    n_heads = config.get("num_attention_heads", int)
    head_dim = config.get("head_dim", int, head_dim, null=None)
    width = head_dim or config.get("hidden_size", int) // max(1, n_heads)
    return AttentionSpec(
        n_heads=n_heads,
        n_kv_heads=config.get("num_key_value_heads", int, n_kv_heads, null=None),
        head_dim=head_dim,
        rope_theta=theta,
        rope_dims=None if part == 1 else int(width * part),
        rope_scaling=scaling,
    )


def normalised(
    mixer: AttentionSpec,
    config: Config,
    qk_norm: Literal[True, "full"] = True,
    eps: float = 1e-6,
    *,
    key: str = EPS,
) -> AttentionSpec:
    """Queries and keys normalised with the model's epsilon, and biases if attention_bias."""
    bias, eps = config.get("attention_bias", bool, False), config.get(key, float, eps)
    return replace(mixer, qk_norm=qk_norm, qk_norm_eps=eps, qkv_bias=bias, out_bias=bias)


def depth(config: Config, shapes: Shapes) -> int:
    """How many layers."""
    return config.count("num_hidden_layers", len(shapes))


def swiglu(config: Config, bias: bool = False) -> SwiGLUSpec:
    """The dense channel."""
    config.only("hidden_act", "silu", "swish")
    return SwiGLUSpec(config.get("intermediate_size", int), bias)


def used_window(config: Config) -> int | None:
    """Of qwen2, qwen3 and qwen3_moe."""
    window = config.get("sliding_window", int, 4096, null=None)
    return window if config.get("use_sliding_window", bool, False) else None


def layer_kinds(
    config: Config, n_layers: int, usual: Sequence[str], table: Mapping[str, T]
) -> list[T]:
    """What the table makes of every layer's `layer_types`; `usual` is what silence means."""
    kinds = config.get("layer_types", tuple[str, ...], tuple(usual))
    if len(kinds) != n_layers:
        config.refuse("layer_types", f"{len(kinds)} of them for {n_layers} layers")
    if not set(kinds) <= table.keys():
        rule = f"are not {n_layers} of {list(table)}; others are not supported"
        config.refuse("layer_types", f"{list(kinds)!r:.80} {rule}")
    return [table[kind] for kind in kinds]


def upper_windows(config: Config, n_layers: int) -> list[int | None]:
    """The window of every layer of qwen2 and qwen3: `layer_types` decides, or a first layer."""
    window, first = used_window(config), config.get("max_window_layers", int, 28)
    n_full = n_layers if window is None else min(first, n_layers)
    slides = layer_kinds(
        config, n_layers, (FULL,) * n_full + (LOCAL,) * (n_layers - n_full), SLIDES
    )
    if window is None and any(slides):
        config.refuse("use_sliding_window", f"no window, but layer_types has {LOCAL}")
    return [window if slide else None for slide in slides]


def window_keys(spec: ModelSpec) -> dict[str, Any]:
    """`sliding_window` and `layer_types` of a model in which some layers attend to a window."""
    windows = [getattr(block.mixer, "window", None) for block in spec.plain_blocks]
    used = [window for window in windows if window is not None]
    kinds = [FULL if window is None else LOCAL for window in windows]
    return {"layer_types": kinds, **({"sliding_window": used[0]} if used else {})}


def first(spec: ModelSpec) -> AttentionSpec:
    """The first layer's attention; `write` finds out whether the other layers agree with it."""
    mixer = spec.plain_blocks[0].mixer
    if not isinstance(mixer, AttentionSpec):
        raise SpecError(f"blocks[0].mixer: {mixer.kind}, and the format knows attention only")
    return mixer


def vocabulary(spec: ModelSpec) -> Tokens:
    """The stem, which must be of tokens."""
    if not isinstance(spec.stem, Tokens):
        raise SpecError(f"stem: {spec.stem.kind}, and the format knows tokens only")
    return spec.stem


def width(spec: ModelSpec) -> int:
    """Of the first dense channel; 1 if there is none."""
    widths = [
        b.channel.width(spec.d_model)
        for b in spec.plain_blocks
        if isinstance(b.channel, SwiGLUSpec)
    ]
    return widths[0] if widths else 1


def heads(spec: ModelSpec) -> dict[str, Any]:
    """What all dialects say in config.json."""
    mixer = first(spec)
    return {
        "vocab_size": vocabulary(spec).vocab_size,
        "hidden_size": spec.d_model,
        "num_hidden_layers": len(spec.blocks),
        "intermediate_size": width(spec),
        "num_attention_heads": mixer.n_heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.width(spec.d_model),
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_head,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **rope_keys(mixer),
    }


def _rope(config: Config, theta: float, rotated: float | None) -> Positions:
    """Those of a config that says them once for all layers."""
    theta, part = config.get("rope_theta", float, theta), rotated or 1.0
    if rotated is not None:
        part = config.get("partial_rotary_factor", float, part)
    context = config.get("max_position_embeddings", int, None)
    old, new = config.within("rope_scaling"), config.within("rope_parameters")
    if old is not None and new is not None:
        config.refuse("rope_scaling", "given, and rope_parameters too; remove one")
    return positions(old or new, theta, part, context, partly=rotated is not None)


def positions(
    keys: Config | None,
    theta: float,
    part: float = 1.0,
    context: int | None = None,
    *,
    partly: bool = False,
) -> Positions:
    """What the keys of `rope_parameters` say; the numbers are what their silence means."""
    if keys is None:
        return Positions(theta, None, part)
    theta = keys.get("rope_theta", float, theta)
    kind = keys.get("rope_type", str, keys.get("type", str, "default"))
    if not partly:
        keys.only("partial_rotary_factor", 1.0)
    part = keys.get("partial_rotary_factor", float, part)
    if kind not in (*SCALINGS, "default"):
        keys.refuse("rope_type", f"{kind!r} is not supported; only default, {', '.join(SCALINGS)}")
    fields = {ours: keys.get(key, object, None) for ours, key in SCALINGS.get(kind, {}).items()}
    if "original_context" in fields and fields["original_context"] is None:
        fields["original_context"] = context
    cut = keys.get("truncate", bool, True)
    keys.finish()
    if kind == "default":
        return Positions(theta, None, part)
    given = {name: value for name, value in fields.items() if value is not None}
    given |= {} if cut else {"truncate": False}
    scaling = RopeScaling.from_dict({"method": kind, **given}, f"{keys.prefix}rope_type")
    return Positions(theta, scaling, part)


def rope_keys(mixer: AttentionSpec) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`; what they cannot say does not survive the reading back."""
    scaling = mixer.rope_scaling
    if scaling is None or scaling.method not in SCALINGS:
        return {"rope_theta": mixer.rope_theta, "rope_scaling": None}
    given = {key: getattr(scaling, ours) for ours, key in SCALINGS[scaling.method].items()}
    given = {key: value for key, value in given.items() if value is not None}
    said: dict[str, Any] = {"rope_type": scaling.method, **given}
    keys = {"rope_theta": mixer.rope_theta, "rope_scaling": said}
    if not scaling.truncate:
        said["truncate"] = False
    if scaling.original_context is not None:
        keys["max_position_embeddings"] = round(scaling.factor * scaling.original_context)
    return keys


def canonical(spec: ModelSpec) -> ModelSpec:
    """Every width written out, and no weight of a training loss but the balance loss's."""
    blocks: list[BlockSpec] = []
    for block in spec.plain_blocks:
        mixer, channel = block.mixer, block.channel
        if isinstance(mixer, AttentionSpec):
            mixer = replace(mixer, n_kv_heads=mixer.kv_heads, head_dim=mixer.width(spec.d_model))
        if isinstance(channel, (SwiGLUSpec, MLPSpec)):
            channel = replace(channel, hidden=channel.width(spec.d_model))
        if isinstance(channel, MoESpec):
            channel = _plain_mixture(channel, spec.d_model)
        blocks.append(replace(block, mixer=mixer, channel=channel))
    return spec.replace(blocks=tuple(blocks))


def _plain_mixture(mixture: MoESpec, d_model: int) -> MoESpec:
    mixture = replace(
        mixture, sequence_weight=0.0, importance_weight=0.0, load_weight=0.0, z_loss_weight=0.0
    )
    expert, *others = set(mixture.expert_specs(d_model))
    if others or not isinstance(expert, SwiGLUSpec) or expert.bias:
        return mixture
    return replace(mixture, experts=(), hidden=expert.width(d_model))


def _llama(config: Config, shapes: Shapes) -> ModelSpec:
    bias = config.get("attention_bias", bool, False)
    mixer = replace(attention(config), qkv_bias=bias, out_bias=bias)
    channel = swiglu(config, bias=config.get("mlp_bias", bool, False))
    config.skip("pretraining_tp", "is_llama_config")  # how matrices were split; SmolLM's mark
    config.only("rope_interleaved", False)
    return trunk(config, [BlockSpec(mixer, channel)] * depth(config, shapes))


def _llama_keys(spec: ModelSpec) -> dict[str, Any]:
    block = spec.plain_blocks[0]
    bias = isinstance(block.channel, SwiGLUSpec) and block.channel.bias
    return {**heads(spec), "attention_bias": first(spec).qkv_bias, "mlp_bias": bias}


def _mistral(config: Config, shapes: Shapes) -> ModelSpec:
    window = config.get("sliding_window", int, 4096, null=None)
    block = BlockSpec(replace(attention(config, n_kv_heads=8), window=window), swiglu(config))
    return trunk(config, [block] * depth(config, shapes))


def _mistral_keys(spec: ModelSpec) -> dict[str, Any]:
    return {**heads(spec), "sliding_window": first(spec).window}


def _qwen2(config: Config, shapes: Shapes) -> ModelSpec:
    mixer = replace(attention(config, n_kv_heads=32), qkv_bias=True)
    return _windowed(config, shapes, mixer)


def _qwen3(config: Config, shapes: Shapes) -> ModelSpec:
    mixer = attention(config, n_kv_heads=32, head_dim=128)
    return _windowed(config, shapes, normalised(mixer, config))


def _windowed(config: Config, shapes: Shapes, mixer: AttentionSpec) -> ModelSpec:
    config.only("use_mrope", False)
    windows, channel = upper_windows(config, depth(config, shapes)), swiglu(config)
    return trunk(config, [BlockSpec(replace(mixer, window=w), channel) for w in windows])


def _qwen3_keys(spec: ModelSpec) -> dict[str, Any]:
    return {**_windowed_keys(spec), "attention_bias": first(spec).qkv_bias}


def _windowed_keys(spec: ModelSpec) -> dict[str, Any]:
    keys = window_keys(spec)
    return {**heads(spec), **keys, "use_sliding_window": "sliding_window" in keys}


def dialect(
    name: str,
    architecture: str,
    spec: Callable[[Config, Shapes], ModelSpec],
    keys: Callable[[ModelSpec], dict[str, Any]],
    layouts: Callable[[ModelSpec], Sequence[Rules]] = lambda _: [renamed(TRUNK | GATED)],
) -> Family:
    """A family with the trunk of Llama."""
    return register(
        Family(
            name,
            spec,
            layouts,
            lambda model: {"architectures": [architecture], "model_type": name, **keys(model)},
            ignored=ROTARY_BUFFERS,
            tied=TIED,
            canonical=canonical,
        )
    )


LLAMA = dialect("llama", "LlamaForCausalLM", _llama, _llama_keys)
MISTRAL = dialect("mistral", "MistralForCausalLM", _mistral, _mistral_keys)
QWEN2 = dialect("qwen2", "Qwen2ForCausalLM", _qwen2, _windowed_keys)
QWEN3 = dialect("qwen3", "Qwen3ForCausalLM", _qwen3, _qwen3_keys)
