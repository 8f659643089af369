"""Who sits the exam: every registered mixer and channel, found through the registry.

A kind whose defaults fit a small model needs no entry here; entries add variants worth examining.
"""

from __future__ import annotations

import pytest
import torch

import kizzasi.eml  # noqa: F401 (registers eml_attention)
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.mixer import ChannelSpec, MixerSpec

D_MODEL, VOCAB, LAYERS = 16, 23, 2

MIXER_VARIANTS: dict[str, dict[str, dict]] = {
    "attention": {
        "mha": {"n_heads": 2},
        "gqa": {"n_heads": 4, "n_kv_heads": 2, "qk_norm": True},
        "mqa-softcap": {"n_heads": 4, "n_kv_heads": 1, "softcap": 5.0, "position": "none"},
        "window": {"n_heads": 2, "window": 5},
        "alibi-window": {"n_heads": 2, "window": 5, "position": "alibi"},
        "partial-rope": {"n_heads": 2, "rope_dims": 4},
    },
    "eml_attention": {"two-heads": {"n_heads": 2}},
    "mamba": {"small": {"d_state": 4}, "expand1": {"d_state": 3, "expand": 1}},
    "rwkv7": {"two-heads": {"head_dim": 8}},
    "s4d": {kind: {"d_state": 8, "init": kind} for kind in ("lin", "inv", "legs", "real")},
}
CHANNEL_VARIANTS: dict[str, dict[str, dict]] = {
    "mlp": {"gelu": {}, "relu2": {"activation": "relu2"}},
    "moe": {"top2": {"n_experts": 4, "top_k": 2}},
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


def model_spec(name: str, *, hybrid: bool = False) -> ModelSpec:
    """A two-layer model of one part; with `hybrid`, an attention layer stands in between."""
    if name in MIXERS:
        block = BlockSpec(MIXERS[name])
    else:
        block = BlockSpec(ATTENTION, CHANNELS[name])
    blocks = (block,) * LAYERS
    if hybrid:
        blocks = (block, BlockSpec(ATTENTION, CHANNELS["mlp-gelu"]), block)
    return ModelSpec(D_MODEL, blocks, Tokens(VOCAB))


every_part = pytest.mark.parametrize("name", [*MIXERS, *CHANNELS])
devices = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ],
)


def make(name: str, *, device: str = "cpu", dtype=torch.float64, hybrid=False, **kwargs):
    """A model whose every parameter is perturbed, so that nothing hides behind a zero or a one."""
    model = build_model(model_spec(name, hybrid=hybrid), seed=1, dtype=torch.float64, **kwargs)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.add_(0.1 * noise.to(p.dtype))
    return model.to(device=device, dtype=dtype)


def tokens(batch: int, length: int, seed: int = 0, device: str = "cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (batch, length), generator=generator).to(device)
