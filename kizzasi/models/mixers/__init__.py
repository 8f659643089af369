"""Sequence mixers: one architecture, one file, one line here."""

from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.mamba import MambaSpec
from kizzasi.models.mixers.rwkv7 import RWKV7Spec
from kizzasi.models.mixers.s4d import S4DSpec

__all__ = ["AttentionSpec", "MambaSpec", "RWKV7Spec", "S4DSpec"]
