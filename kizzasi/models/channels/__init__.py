"""Channel mixers: one architecture, one file, one line here."""

from kizzasi.models.channels.mlp import MLPSpec
from kizzasi.models.channels.moe import MoESpec
from kizzasi.models.channels.rwkv_channel import RWKVChannelSpec
from kizzasi.models.channels.swiglu import SwiGLUSpec

__all__ = ["MLPSpec", "MoESpec", "RWKVChannelSpec", "SwiGLUSpec"]
