"""Who sits the exam: every registered mixer and channel, found through the registry.

A kind whose defaults fit a small model needs no entry here; entries add variants worth examining.
"""

from __future__ import annotations

import pytest
import torch

import kizzasi.eml  # noqa: F401 (registers eml_attention)
from kizzasi.models import BlockSpec, ModelSpec, Tokens
from kizzasi.models.mixer import ChannelSpec, MixerSpec
from kizzasi.testing.mixer import Exam

D_MODEL, VOCAB, LAYERS = 16, 23, 2

MAMBA, HEADS = {"kind": "mamba", "d_state": 3}, {"kind": "attention", "n_heads": 2}
RWKV7 = {"kind": "rwkv7", "head_dim": 8}
LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
MIXER_VARIANTS: dict[str, dict[str, dict]] = {
    "attention": {
        "mha": {"n_heads": 2},
        "gqa": {"n_heads": 4, "n_kv_heads": 2, "qk_norm": True},
        "mqa-softcap": {"n_heads": 4, "n_kv_heads": 1, "softcap": 5.0, "position": "none"},
        "window": {"n_heads": 2, "window": 5},
        "scaled": {"n_heads": 2, "scale": 0.7},
        "alibi-window": {"n_heads": 2, "window": 5, "position": "alibi"},
        "partial-rope": {"n_heads": 2, "rope_dims": 4},
        "int8": {"n_heads": 4, "n_kv_heads": 1, "kv_quant": "int8"},
        "nf4-ring": {"n_heads": 2, "window": 5, "n_global": 2, "kv_quant": "nf4"},
        "nf4-groups": {"n_heads": 4, "n_kv_heads": 2, "kv_quant": "nf4", "kv_group": 3},
        "int8-groups-ring": {
            "n_heads": 2,
            "window": 6,
            "n_global": 2,
            "position": "alibi",
            "kv_quant": "int8",
            "kv_group": 4,
        },
        "blocks": {
            "n_heads": 4,
            "n_kv_heads": 2,
            "block": 4,
            "n_blocks": 2,
            "position": "relative",
            "qkv_rank": 6,
            "value_glu": True,
        },
        "dilated-global": {
            "n_heads": 2,
            "window": 3,
            "dilation": 2,
            "n_global": 2,
            "position": "xpos",
        },
        "sinks": {"n_heads": 2, "sinks": True, "qk_norm": "head", "qk_norm_kind": "layer"},
        "encoder": {"n_heads": 4, "n_kv_heads": 2, "causal": False},
        "full-norm-clip": {"n_heads": 4, "n_kv_heads": 2, "qk_norm": "full", "clip_qkv": 0.5},
        "gate": {"n_heads": 2, "gate": True, "qk_norm": True, "qk_norm_kind": "rms_plus_one"},
        "longrope": {
            "n_heads": 2,
            "rope_scaling": {
                "method": "longrope",
                "factor": 4,
                "original_context": 16,
                "divisors": [1, 2, 3, 4],
            },
        },
        "llama3-rope": {
            "n_heads": 2,
            "rope_scaling": {"method": "llama3", "factor": 8, "original_context": 16},
        },
    },
    "bidirectional": {
        "sum": {"mixer": MAMBA},
        "concat": {"mixer": MAMBA, "combine": "concat"},
        "tied": {"mixer": MAMBA, "combine": "mean", "tied": True},
        "sharing": {"mixer": RWKV7},
    },
    "delta_product": {
        "two-updates": {"n_heads": 2},
        "three-updates": {"n_heads": 2, "n_updates": 3, "expand_v": 0.5, "gated": False},
    },
    "eml_attention": {"two-heads": {"n_heads": 2}},
    "forgetting": {
        "two-heads": {"n_heads": 2},
        "window": {"n_heads": 4, "n_kv_heads": 2, "window": 5, "gate": True, "qkv_bias": True},
        "rope": {"n_heads": 2, "position": "rope", "qk_norm": True},
    },
    "gated_delta": {
        "two-heads": {"n_heads": 2},
        "shared-keys": {"n_heads": 4, "n_key_heads": 2, "key_head_dim": 3, "value_head_dim": 5},
        "negative": {"n_heads": 2, "negative_eigenvalues": True},
        "ungated": {"n_heads": 2, "gated": False},
    },
    "gla": {
        "two-heads": {"n_heads": 2, "gate_rank": 3},
        "fast-decay": {"n_heads": 1, "expand_k": 0.25, "expand_v": 1.5, "gate_normalizer": 0.1},
    },
    "kda": {
        "two-heads": {"n_heads": 2},
        "values": {
            **{"n_heads": 2, "n_value_heads": 4, "head_dim": 4, "expand_v": 1.5},
            **{"negative_eigenvalues": True, "gate_floor": -5.0, "conv_bias": True},
        },
        "channel-gates": {
            **{"n_heads": 1, "n_value_heads": 2, "head_dim": 6, "expand_v": 0.5},
            **{"conv": False, "gate_bias": True, "channel_gates": True},
        },
    },
    "kernel_attention": {
        "favor": {"n_heads": 2, "n_features": 12},
        "laplace": {"n_heads": 2, "n_features": 9, "feature": "laplace", "qkv_bias": True},
    },
    "lightning": {"two-heads": {"n_heads": 2}, "wide": {"n_heads": 2, "head_dim": 5}},
    "long_conv": {"short": {"max_len": 9, "n_bands": 3}, "long": {"max_len": 128, "d_conv": 1}},
    "mamba": {
        "small": {"d_state": 4},
        "expand1": {"d_state": 3, "expand": 1},
        "jamba": {"d_state": 4, "dt_rank": 3, "inner_norm": "rms"},
        "falcon": {"d_state": 4, "dt_rank": 3, "inner_norm": "weightless"},
    },
    "mamba2": {
        "small": {"d_state": 5, "head_dim": 8},
        "groups": {"d_state": 3, "head_dim": 4, "n_groups": 2, "dt_limit": [0.01, 0.1]},
        "bare": {"d_state": 4, "head_dim": 8, "expand": 1.5, "rms_norm": False, "bias": True},
        "norm-first": {"d_state": 4, "head_dim": 8, "norm_before_gate": True, "conv_bias": False},
    },
    "mamba3": {
        "small": {"d_state": 6, "head_dim": 8},
        "groups": {"d_state": 4, "head_dim": 8, "n_groups": 2, "rope_fraction": 1.0},
        "mimo": {"d_state": 6, "head_dim": 8, "n_groups": 2, "rank": 3},
        "mimo-norm": {
            "d_state": 4,
            "head_dim": 8,
            "rank": 2,
            "out_norm": True,
            "rope_fraction": 1.0,
        },
        "siso-norm": {"d_state": 4, "head_dim": 8, "out_norm": True},
        "heavy-tail": {"d_state": 4, "head_dim": 4, "expand": 1, "a_activation": "heavy_tail"},
    },
    "parallel": {
        **{mode: {"mixers": [MAMBA, HEADS], "combine": mode} for mode in ("sum", "weighted")},
        "concat": {"mixers": [RWKV7, RWKV7, HEADS], "combine": "concat"},
    },
    "routed": {
        "top1": {"mixers": [MAMBA, HEADS]},
        "top2": {"mixers": [MAMBA, HEADS, RWKV7], "top_k": 2, "temperature": 0.5},
    },
    "retention": {"two-heads": {"n_heads": 2}, "narrow": {"n_heads": 4, "expand_v": 0.5}},
    "mla": {
        "direct": {**LATENT, "n_heads": 2},
        "no-positions": {**LATENT, "n_heads": 2, "position": "none"},
        "int8": {**LATENT, "n_heads": 2, "kv_quant": "int8"},
        "summaries": {**LATENT, "n_heads": 4, "n_latents": 2, "every": 3, "fade": 0.7},
        "coded-summaries": {**LATENT, "n_heads": 2, "every": 2, "kv_quant": "int8"},
        "q-latent-yarn": {
            **LATENT,
            "n_heads": 4,
            "q_lora_rank": 7,
            "scale": 0.4,
            "rope_scaling": {"method": "yarn", "factor": 4, "original_context": 16},
        },
    },
    "mlstm": {"two-heads": {"n_heads": 2}, "wide": {"n_heads": 1, "expand_k": 1, "expand_v": 1.5}},
    "rg_lru": {"two-heads": {"n_heads": 2}, "wide": {"n_heads": 3, "expand": 1.5}},
    "rwkv4": {"square": {}, "wide": {"d_inner": 24}},
    "rwkv5": {"two-heads": {"head_dim": 8}},
    "rwkv6": {"two-heads": {"head_dim": 8, "mix_rank": 3, "decay_rank": 5}},
    "rwkv7": {"two-heads": {"head_dim": 8}},
    "sequence_routed": {
        "top2": {"mixers": [MAMBA, MAMBA, MAMBA], "top_k": 2},  # the exam's two rows choose all
        "all": {"mixers": [MAMBA, HEADS, RWKV7], "top_k": 3, "temperature": 0.5},
        "mean": {"mixers": [RWKV7, HEADS], "top_k": 2, "summary": "mean"},
    },
    "short_conv": {"three-taps": {}, "bias": {"d_conv": 4, "bias": True}},
    "slstm": {"two-heads": {"n_heads": 2}},
    "s4": {kind: {"d_state": 8, "init": kind} for kind in ("legs", "fourier")},
    "s4d": {kind: {"d_state": 8, "init": kind} for kind in ("lin", "inv", "legs", "real")},
    "s5": {"one-block": {"d_state": 6, "n_blocks": 1}, "blocks": {"d_state": 8, "n_blocks": 2}},
}
CHANNEL_VARIANTS: dict[str, dict[str, dict]] = {
    "mlp": {
        "gelu": {},
        "relu2": {"activation": "relu2"},
        "silu-bias": {"activation": "silu", "bias": True},
        "relu": {"activation": "relu"},
    },
    "swiglu": {"plain": {}, "bias": {"bias": True}, "geglu": {"activation": "gelu_tanh"}},
    "moe": {
        "top2": {"n_experts": 4, "top_k": 2},
        "deepseek": {
            "n_experts": 4,
            "router": {
                **{"kind": "top_k", "score": "sigmoid", "bias_rate": 0.1, "scale": 2.5},
                **{"n_groups": 2, "top_groups": 1, "group_best": 2},
            },
            "shared_hidden": 8,
            "shared_gate": True,
        },
        "listed": {
            "n_experts": 3,
            "experts": [{"kind": "swiglu", "hidden": 8, "bias": True}] * 3,
            "normalize": "all",
        },
        "gpt-oss": {
            "n_experts": 3,
            "experts": [
                {
                    **{"kind": "swiglu", "hidden": 8, "bias": True, "activation": "gelu_quick"},
                    **{"limit": 0.5, "up_offset": 1.0},
                }
            ]
            * 3,
            "router": {"kind": "top_k", "logit_bias": True},
        },
    },
    "rwkv_channel": {f"v{n}": {"hidden": 40, "version": n} for n in (4, 6, 7)},
}


def _cases(family: type, variants: dict[str, dict[str, dict]]) -> dict[str, object]:
    parts = {}
    for kind, cls in family.registry.items():
        for name, fields in variants.get(kind, {"default": {}}).items():
            parts[f"{kind}-{name}"] = cls.from_dict(fields)
    return parts


MIXERS = _cases(MixerSpec, MIXER_VARIANTS)
CHANNELS = _cases(ChannelSpec, CHANNEL_VARIANTS)
ATTENTION = MIXERS["attention-mha"]


BLOCKS: dict[str, dict] = {
    "block-post": {"norm_at": "post"},
    "block-sandwich": {"norm_at": "both", "norm": "scale", "residual_scale": 0.5},
    "block-parallel": {"parallel": "separate", "norm": "layer", "stream_scale": 1.5},
    "block-shared": {"parallel": "shared", "norm": "layer_unbiased"},
}
SCALES = {"embed_scale": 4.0, "logit_scale": 0.5, "logit_cap": 3.0}  # of models of BLOCKS


def model_spec(name: str, *, hybrid: bool = False) -> ModelSpec:
    """A two-layer model of one part; with `hybrid`, an attention layer stands in between."""
    scales = {}
    if name in MIXERS:
        block = BlockSpec(MIXERS[name])
    elif name in BLOCKS:
        scales = SCALES
        block = BlockSpec(MIXERS["mamba-small"], CHANNELS["mlp-gelu"], **BLOCKS[name])
    else:
        block = BlockSpec(ATTENTION, CHANNELS[name])
    blocks = (block,) * LAYERS
    if hybrid:
        blocks = (block, BlockSpec(ATTENTION, CHANNELS["mlp-gelu"]), block)
    return ModelSpec(D_MODEL, blocks, Tokens(VOCAB), **scales)


# The first variant of every kind, for what a kind does whatever its settings are.
KINDS = list({name.split("-")[0]: name for name in reversed([*MIXERS, *CHANNELS])}.values())
every_kind = pytest.mark.parametrize("name", KINDS)
every_part = pytest.mark.parametrize("name", [*MIXERS, *CHANNELS])
every_model = pytest.mark.parametrize("name", [*MIXERS, *CHANNELS, *BLOCKS])
CAUSAL = {name: part.causal for name, part in {**MIXERS, **CHANNELS}.items()}
every_causal_kind = pytest.mark.parametrize("name", [name for name in KINDS if CAUSAL[name]])
causal_parts = pytest.mark.parametrize("name", [name for name in CAUSAL if CAUSAL[name]])
causal_models = pytest.mark.parametrize("name", [n for n in CAUSAL if CAUSAL[n]] + [*BLOCKS])
other_parts = pytest.mark.parametrize("name", [name for name in CAUSAL if not CAUSAL[name]])
devices = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.cuda),
    ],
)


def exam_of(name: str, device: str = "cpu") -> Exam:
    """The exam of a part; channels are examined without a hybrid."""
    return Exam(model_spec(name), model_spec(name, hybrid=name in MIXERS), device)


def make(name: str, *, device: str = "cpu", dtype=torch.float64, hybrid=False, **kwargs):
    """A model whose every parameter is perturbed, so that nothing hides behind a zero or a one."""
    spec = model_spec(name, hybrid=hybrid)
    return Exam(spec, spec, device).make(dtype=dtype, **kwargs)


def tokens(batch: int, length: int, seed: int = 0, device: str = "cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (batch, length), generator=generator).to(device)
