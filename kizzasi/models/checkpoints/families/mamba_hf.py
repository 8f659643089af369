"""Mamba models as transformers stores them: mamba, falcon_mamba, mamba2.

| model_type | mixer | what differs |
|---|---|---|
| mamba | mamba | nothing; early files also repeat keys of state-spaces' own config |
| falcon_mamba | mamba | weightless norms of dt, B and C |
| mamba2 | mamba2 | one epsilon for the layers' norms and the mixers' |

`time_step_min`, `_max` and `_floor` matter to fresh weights only; they are kept for those who build
from the spec. `time_step_limit` bounds the steps of a finished model.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, TypeVar

from kizzasi.errors import SpecError
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.families import llama
from kizzasi.models.checkpoints.foreign import Family, register
from kizzasi.models.checkpoints.names import renamed
from kizzasi.models.checkpoints.storage.stored import Shapes, count_values
from kizzasi.models.mixer import MixerSpec
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.mamba import MambaSpec
from kizzasi.models.mixers.mamba2 import Mamba2Spec
from kizzasi.models.mixers.mamba3 import Mamba3Spec
from kizzasi.models.spec import BlockSpec, ModelSpec
from kizzasi.models.stems import Tokens
from kizzasi.strict import coerce

M = TypeVar("M", bound=MixerSpec)
PARTS = (
    *("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj", "norm"),
    *("dt_layernorm", "b_layernorm", "c_layernorm"),
)
STEPS = {"dt_min": "time_step_min", "dt_max": "time_step_max", "dt_floor": "time_step_floor"}
NO_BOUND = (math.inf, {"__float__": "Infinity"})  # as transformers 4 and 5 write it


def mixer_names(theirs: str) -> dict[str, str]:
    """Of both Mambas, below this prefix."""
    parts = {f"blocks.#.mixer.{part}.@": f"{theirs}.{part}.@" for part in PARTS}
    return {"blocks.#.mixer.@": f"{theirs}.@", **parts}


NAMES = {
    "stem.embedding.@": "backbone.embeddings.@",
    "stem.lm_head.@": "lm_head.@",
    "norm.@": "backbone.norm_f.@",
    "blocks.#.mixer_norm.@": "backbone.layers.#.norm.@",
    **mixer_names("backbone.layers.#.mixer"),
}


def d_model_of(config: Config, shapes: Shapes, key: str = "hidden_size") -> int:
    return config.count(key, count_values(shapes))


def step_rank(config: Config, key: str) -> int | None:
    """`dt_rank`; "auto" is None."""
    if config.data.get(key) != "auto":
        return config.get(key, int, None)
    config.skip(key)
    return None


def step_limit(config: Config, key: str) -> tuple[float | None, float | None]:
    """`dt_limit` of Mamba-2."""
    bounds = config.get(key, tuple[object, ...], (0.0, None))
    if len(bounds) != 2:
        config.refuse(key, f"{list(bounds)!r:.80} is not a lower and an upper bound")
    low, high = bounds
    high = None if high in NO_BOUND else high
    return coerce(low, float, f"{key}[0]"), coerce(high, float | None, f"{key}[1]")


def step_limit_key(mixer: Mamba2Spec) -> list[float | None]:
    low, high = mixer.dt_limit
    return [low, math.inf if high is None else high]


def only_mixer(spec: ModelSpec, kind: type[M]) -> M:
    """The first mixer of a kind; `write` finds out whether the others agree with it."""
    found = [block.mixer for block in spec.plain_blocks if isinstance(block.mixer, kind)]
    if not found:
        raise SpecError(f"no block has the mixer {kind.kind!r}, and the format needs one")
    return found[0]


def canonical(spec: ModelSpec) -> ModelSpec:
    """Llama's, and Mamba's widths written out; what has no effect is as by default."""
    spec = llama.canonical(spec)
    blocks = (replace(b, mixer=_plain_mixer(b.mixer, spec.d_model)) for b in spec.plain_blocks)
    return spec.replace(blocks=tuple(blocks))


def without_steps(spec: ModelSpec) -> ModelSpec:
    """`canonical`, for formats that say nothing of fresh weights."""
    spec, blocks = canonical(spec), []
    for block in spec.plain_blocks:
        mixer = block.mixer
        if isinstance(mixer, (MambaSpec, Mamba2Spec)):
            mixer = replace(mixer, **{name: getattr(MambaSpec(), name) for name in STEPS})
        blocks.append(replace(block, mixer=mixer))
    return spec.replace(blocks=tuple(blocks))


def _plain_mixer(mixer: MixerSpec, d_model: int) -> MixerSpec:
    if isinstance(mixer, AttentionSpec):
        whole = mixer.rope_dims == mixer.width(d_model)
        mixer = replace(mixer, rope_dims=None) if whole else mixer
        return mixer if mixer.position == "rope" else replace(mixer, rope_theta=1e4)
    if isinstance(mixer, MambaSpec):
        eps = mixer.inner_norm_eps if mixer.inner_norm else MambaSpec().inner_norm_eps
        rank, expand = mixer.rank(d_model), mixer.d_inner(d_model) / d_model
        return replace(mixer, dt_rank=rank, expand=expand, inner_norm_eps=eps)
    if isinstance(mixer, (Mamba2Spec, Mamba3Spec)):
        expand = mixer.n_heads(d_model) * mixer.head_dim / d_model
        return replace(mixer, expand=expand)
    return mixer


def _steps(config: Config) -> dict[str, Any]:
    usual = MambaSpec()
    return {ours: config.get(key, float, getattr(usual, ours)) for ours, key in STEPS.items()}


def _model(config: Config, shapes: Shapes, mixer: MixerSpec, *, tied: bool) -> ModelSpec:
    n_layers = config.count("num_hidden_layers", len(shapes))
    config.only("hidden_act", "silu", "swish")
    config.only("n_layer", n_layers)
    config.only("rms_norm", True)
    config.only("ssm_cfg", {})
    config.skip("residual_in_fp32", "fused_add_norm")  # precision and speed
    config.skip("use_mambapy", "use_falcon_mambapy", "use_associative_scan", "chunk_size")  # speed
    config.skip("rescale_prenorm_residual", "time_step_scale", "time_step_init_scheme")  # init
    config.skip("pad_vocab_size_multiple")  # vocab_size is that after padding
    return ModelSpec(
        d_model=d_model_of(config, shapes),
        blocks=(BlockSpec(mixer),) * n_layers,
        stem=Tokens(config.get("vocab_size", int)),
        norm_eps=config.get("layer_norm_epsilon", float, 1e-5),
        tie_head=config.get("tie_word_embeddings", bool, tied),
    )


def _mamba_mixer(config: Config, shapes: Shapes) -> MambaSpec:
    d_model = d_model_of(config, shapes)
    inner = int(config.get("expand", float, 2.0) * d_model)
    inner = config.get("intermediate_size", int, inner)  # the two differ in FalconMamba-7B
    config.only("d_inner", inner)
    config.only("d_model", d_model)
    return MambaSpec(
        d_state=config.get("state_size", int, 16),
        d_conv=config.get("conv_kernel", int, 4),
        expand=inner / d_model,
        dt_rank=step_rank(config, "time_step_rank"),
        conv_bias=config.get("use_conv_bias", bool, True),
        bias=config.get("use_bias", bool, False),
        **_steps(config),
    )


def _mamba(config: Config, shapes: Shapes) -> ModelSpec:
    return _model(config, shapes, _mamba_mixer(config, shapes), tied=True)


def _falcon_mamba(config: Config, shapes: Shapes) -> ModelSpec:
    eps = config.get("mixer_rms_eps", float, 1e-6)
    mixer = replace(_mamba_mixer(config, shapes), inner_norm="weightless", inner_norm_eps=eps)
    return _model(config, shapes, mixer, tied=True)


def _mamba2(config: Config, shapes: Shapes) -> ModelSpec:
    d_model = d_model_of(config, shapes)
    n_heads, head_dim = config.get("num_heads", int, 128), config.get("head_dim", int, 64)
    inner = n_heads * head_dim
    if config.get("expand", float, 2.0) * d_model != inner:
        rule = (
            f"times hidden_size {d_model} it is not num_heads {n_heads} times head_dim {head_dim}"
        )
        config.refuse("expand", f"{config.data.get('expand', 2)} is not supported: {rule}")
    config.only("intermediate_size", inner)
    # The first is Mamba-1's. transformers never read the second: the gate always comes first.
    config.skip("time_step_rank", "norm_before_gate")
    mixer = Mamba2Spec(
        d_state=config.get("state_size", int, 128),
        d_conv=config.get("conv_kernel", int, 4),
        expand=inner / d_model,
        head_dim=head_dim,
        n_groups=config.get("n_groups", int, 8),
        dt_limit=step_limit(config, "time_step_limit"),
        norm_eps=config.get("layer_norm_epsilon", float, 1e-5),
        conv_bias=config.get("use_conv_bias", bool, True),
        bias=config.get("use_bias", bool, False),
        **_steps(config),
    )
    return _model(config, shapes, mixer, tied=False)


def _keys(
    spec: ModelSpec, mixer: MambaSpec | Mamba2Spec, kind: str, architecture: str
) -> dict[str, Any]:
    """What the three say alike."""
    return {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": llama.vocabulary(spec).vocab_size,
        "hidden_size": spec.d_model,
        "num_hidden_layers": len(spec.blocks),
        "state_size": mixer.d_state,
        "conv_kernel": mixer.d_conv,
        "use_conv_bias": mixer.conv_bias,
        "use_bias": mixer.bias,
        "hidden_act": "silu",
        "layer_norm_epsilon": spec.norm_eps,
        "tie_word_embeddings": spec.tie_head,
        **{key: getattr(mixer, ours) for ours, key in STEPS.items()},
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }


def _mamba_keys(spec: ModelSpec, kind: str, architecture: str) -> dict[str, Any]:
    mixer = only_mixer(spec, MambaSpec)
    return {
        **_keys(spec, mixer, kind, architecture),
        "expand": max(1, round(mixer.expand)),
        "intermediate_size": mixer.d_inner(spec.d_model),
        "time_step_rank": mixer.rank(spec.d_model),
    }


def _falcon_mamba_keys(spec: ModelSpec) -> dict[str, Any]:
    keys = _mamba_keys(spec, "falcon_mamba", "FalconMambaForCausalLM")
    return {**keys, "mixer_rms_eps": only_mixer(spec, MambaSpec).inner_norm_eps}


def _mamba2_keys(spec: ModelSpec) -> dict[str, Any]:
    mixer = only_mixer(spec, Mamba2Spec)
    n_heads = mixer.n_heads(spec.d_model)
    return {
        **_keys(spec, mixer, "mamba2", "Mamba2ForCausalLM"),
        "expand": n_heads * mixer.head_dim // spec.d_model,
        "num_heads": n_heads,
        "head_dim": mixer.head_dim,
        "n_groups": mixer.n_groups,
        "time_step_limit": step_limit_key(mixer),
    }


for _name, _spec, _config in (
    ("mamba", _mamba, lambda spec: _mamba_keys(spec, "mamba", "MambaForCausalLM")),
    ("falcon_mamba", _falcon_mamba, _falcon_mamba_keys),
    ("mamba2", _mamba2, _mamba2_keys),
):
    register(
        Family(
            _name,
            _spec,
            lambda _: [renamed(NAMES)],
            _config,
            tied=("lm_head.weight", "backbone.embeddings.weight"),
            canonical=canonical,
        )
    )
