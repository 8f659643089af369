"""Channel mixers: one architecture, one file, one line here."""

from kizzasi.models.channels.mlp import MLP, MLPSpec
from kizzasi.models.channels.moe import MoE, MoESpec
from kizzasi.models.channels.rwkv_channel import RWKVChannel, RWKVChannelSpec
from kizzasi.models.channels.swiglu import SwiGLU, SwiGLUSpec

__all__ = [
    "MLP",
    "MLPSpec",
    "MoE",
    "MoESpec",
    "RWKVChannel",
    "RWKVChannelSpec",
    "SwiGLU",
    "SwiGLUSpec",
]
