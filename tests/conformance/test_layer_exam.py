"""The exam that every registered layer sits, found through the registry."""

import pytest

from kizzasi.models import LayerSpec, list_layers
from kizzasi.testing import check_layer

D = 8
MAMBA = {"mixer": {"kind": "mamba", "d_state": 2}}
HEADS = {"mixer": {"kind": "attention", "n_heads": 2}, "channel": {"kind": "mlp", "hidden": 8}}
SEES_ALL = {"mixer": {"kind": "attention", "n_heads": 2, "causal": False}}
NEAR = {"mixer": {"kind": "attention", "n_heads": 2, "window": 3}}
CONV = {"mixer": {"kind": "short_conv"}}
RWKV7 = {"mixer": {"kind": "rwkv7", "head_dim": 4}, "norm": "layer"}


def heads(**fields):
    return {"mixer": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2, **fields}}


# kind -> name -> the layers of a stack that belong together
BESIDE = {"kind": "aside", "n_heads": 2, "hidden": 6, "adapter_rank": 2}
VARIANTS: dict[str, dict[str, list[dict]]] = {
    "aside": {
        "own": [{**BESIDE, **MAMBA, "bias": True, "activation": "silu"}],
        "shared": [
            CONV,
            {**BESIDE, **MAMBA, "position": "rope", "adapt_heads": True, "head_dim": 4},
            {**BESIDE, **CONV, "position": "rope", "adapt_heads": True, "head_dim": 4, "layer": 1},
        ],
    },
    "block": {
        "keys-lent": [heads(qk_norm=True), MAMBA, heads(kv_from=0, qk_norm=True, gate=True)],
        "window-memory": [
            MAMBA,
            heads(),
            heads(memory_from=0, window=3),
            heads(kv_from=2, window=3),
        ],
    },
    "chunked": {
        "one": [MAMBA, {"kind": "chunked", "body": [HEADS, NEAR], "rate": 2.0}],
        "nested": [
            {
                "kind": "chunked",
                "body": [RWKV7, {"kind": "chunked", "body": [NEAR], "rate": 2.0}],
                "rate": 3.0,
            },
        ],
    },
    "downsample": {
        "mean": [{"kind": "downsample", "body": [HEADS, MAMBA], "factor": 2}],
        "linear": [
            {
                "kind": "downsample",
                "body": [NEAR],
                "factor": 3,
                "pooling": "linear",
                "upsampling": "linear",
            }
        ],
        "nested": [
            RWKV7,
            {
                "kind": "downsample",
                "body": [RWKV7, {"kind": "downsample", "body": [HEADS], "factor": 5}],
                "factor": 2,
            },
        ],
    },
    "condition": {
        "film": [{"kind": "condition", "body": [HEADS], "groups": 2}],
        "add-out": [{"kind": "condition", "body": [MAMBA], "op": "add", "at": "out"}],
        "scale-ema": [
            {"kind": "condition", "body": [NEAR], "op": "scale", "source": "ema", "at": "stream"}
        ],
        "lora": [{"kind": "condition", "body": [CONV], "op": "lora", "rank": 3, "source": "ema"}],
        "segments-turn-queries": [
            {
                "kind": "condition",
                "body": [heads(gate=True, window=3), HEADS | heads()],
                "at": "q",
                "op": "lora",
                "rank": 2,
                "source": "segment",
                "segment": 3,
                "hidden": 4,
            }
        ],
    },
    "depth_routed": {
        "half": [{"kind": "depth_routed", "body": [HEADS, MAMBA]}],
        "nested": [
            RWKV7,
            {
                "kind": "depth_routed",
                "body": [RWKV7, {"kind": "loop", "body": [NEAR], "n_loops": 2}],
                "capacity": 0.7,
            },
            RWKV7,
        ],
    },
    "latent": {
        "paper": [
            HEADS,
            {
                "kind": "latent",
                "body": [HEADS, HEADS],
                "encoder": [SEES_ALL],
                "n_bits": 3,
                "inject": ["kv"],
                "query": "learned",
            },
        ],
        "add": [{"kind": "latent", "body": [HEADS], "encoder": [SEES_ALL], "n_bits": 3}],
        "film-lora": [
            RWKV7,
            {
                "kind": "latent",
                "body": [RWKV7, MAMBA],
                "encoder": [SEES_ALL, RWKV7],
                "inject": ["film", "lora"],
                "rank": 2,
                "form": "table",
                "n_bits": 3,
            },
        ],
    },
    "loop": {
        "identity": [{"kind": "loop", "body": [MAMBA, NEAR], "n_loops": 2}],
        "first-keys": [{"kind": "loop", "body": [HEADS, NEAR], "n_loops": 3, "keys": "first"}],
        "huginn": [
            {
                "kind": "loop",
                "body": [HEADS],
                "n_loops": 3,
                "adapter": "concat_linear",
                "noise_std": 0.5,
                "norm": "rms",
            }
        ],
        "nested": [
            RWKV7,
            {
                "kind": "loop",
                "body": [RWKV7, {"kind": "loop", "body": [CONV], "n_loops": 2}],
                "n_loops": 2,
                "adapter": "residual",
            },
        ],
    },
    "shared": {"twice": [HEADS, MAMBA, {"kind": "shared", "layer": 0}]},
}
STACKS = {
    f"{kind}-{name}": tuple(LayerSpec.from_dict(layer) for layer in layers)
    for kind, stacks in VARIANTS.items()
    for name, layers in stacks.items()
}
every_stack = pytest.mark.parametrize("name", STACKS)


def test_every_registered_kind_is_examined():
    assert set(VARIANTS) == set(list_layers())


@every_stack
def test_layers_pass(name):
    check_layer(*STACKS[name], d_model=D)
