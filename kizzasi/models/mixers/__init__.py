"""Sequence mixers: one architecture, one file, one line here."""

from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.bidirectional import BidirectionalSpec
from kizzasi.models.mixers.delta_product import DeltaProductSpec
from kizzasi.models.mixers.gated_delta import GatedDeltaSpec
from kizzasi.models.mixers.gla import GLASpec
from kizzasi.models.mixers.kda import KDASpec
from kizzasi.models.mixers.lightning import LightningSpec
from kizzasi.models.mixers.long_conv import LongConvSpec
from kizzasi.models.mixers.mamba import MambaSpec
from kizzasi.models.mixers.mamba2 import Mamba2Spec
from kizzasi.models.mixers.mamba3 import Mamba3Spec
from kizzasi.models.mixers.mla import MLASpec
from kizzasi.models.mixers.mlstm import MLSTMSpec
from kizzasi.models.mixers.parallel import ParallelSpec
from kizzasi.models.mixers.retention import RetentionSpec
from kizzasi.models.mixers.rg_lru import RGLRUSpec
from kizzasi.models.mixers.routed import RoutedSpec
from kizzasi.models.mixers.rwkv4 import RWKV4Spec
from kizzasi.models.mixers.rwkv5 import RWKV5Spec
from kizzasi.models.mixers.rwkv6 import RWKV6Spec
from kizzasi.models.mixers.rwkv7 import RWKV7Spec
from kizzasi.models.mixers.s4 import S4Spec
from kizzasi.models.mixers.s4d import S4DSpec
from kizzasi.models.mixers.s5 import S5Spec
from kizzasi.models.mixers.sequence_routed import SequenceRoutedSpec
from kizzasi.models.mixers.short_conv import ShortConvSpec
from kizzasi.models.mixers.slstm import SLSTMSpec

__all__ = [
    "AttentionSpec",
    "BidirectionalSpec",
    "DeltaProductSpec",
    "GLASpec",
    "GatedDeltaSpec",
    "KDASpec",
    "LightningSpec",
    "LongConvSpec",
    "MLASpec",
    "MLSTMSpec",
    "Mamba2Spec",
    "Mamba3Spec",
    "MambaSpec",
    "ParallelSpec",
    "RGLRUSpec",
    "RWKV4Spec",
    "RWKV5Spec",
    "RWKV6Spec",
    "RWKV7Spec",
    "RetentionSpec",
    "RoutedSpec",
    "S4DSpec",
    "S4Spec",
    "S5Spec",
    "SLSTMSpec",
    "SequenceRoutedSpec",
    "ShortConvSpec",
]
