"""Sequence mixers: one architecture, one file, one line here."""

from kizzasi.models.mixers.attention import Attention, AttentionSpec
from kizzasi.models.mixers.bidirectional import Bidirectional, BidirectionalSpec
from kizzasi.models.mixers.delta_product import DeltaProduct, DeltaProductSpec
from kizzasi.models.mixers.forgetting import Forgetting, ForgettingSpec
from kizzasi.models.mixers.gated_delta import GatedDelta, GatedDeltaSpec
from kizzasi.models.mixers.gla import GLA, GLASpec
from kizzasi.models.mixers.kda import KDA, KDASpec
from kizzasi.models.mixers.kernel_attention import KernelAttention, KernelAttentionSpec
from kizzasi.models.mixers.lightning import Lightning, LightningSpec
from kizzasi.models.mixers.long_conv import LongConv, LongConvSpec
from kizzasi.models.mixers.mamba import Mamba, MambaSpec
from kizzasi.models.mixers.mamba2 import Mamba2, Mamba2Spec
from kizzasi.models.mixers.mamba3 import Mamba3, Mamba3Spec
from kizzasi.models.mixers.mla import MLA, MLASpec
from kizzasi.models.mixers.mlstm import MLSTM, MLSTMSpec
from kizzasi.models.mixers.parallel import Parallel, ParallelSpec
from kizzasi.models.mixers.retention import Retention, RetentionSpec
from kizzasi.models.mixers.rg_lru import RGLRU, RGLRUSpec
from kizzasi.models.mixers.routed import Routed, RoutedSpec
from kizzasi.models.mixers.rwkv4 import RWKV4, RWKV4Spec
from kizzasi.models.mixers.rwkv5 import RWKV5, RWKV5Spec
from kizzasi.models.mixers.rwkv6 import RWKV6, RWKV6Spec
from kizzasi.models.mixers.rwkv7 import RWKV7, RWKV7Spec
from kizzasi.models.mixers.s4 import S4, S4Spec
from kizzasi.models.mixers.s4d import S4D, S4DSpec
from kizzasi.models.mixers.s5 import S5, S5Spec
from kizzasi.models.mixers.sequence_routed import SequenceRouted, SequenceRoutedSpec
from kizzasi.models.mixers.short_conv import ShortConv, ShortConvSpec
from kizzasi.models.mixers.slstm import SLSTM, SLSTMSpec

__all__ = [
    "GLA",
    "KDA",
    "MLA",
    "MLSTM",
    "RGLRU",
    "RWKV4",
    "RWKV5",
    "RWKV6",
    "RWKV7",
    "S4",
    "S4D",
    "S5",
    "SLSTM",
    "Attention",
    "AttentionSpec",
    "Bidirectional",
    "BidirectionalSpec",
    "DeltaProduct",
    "DeltaProductSpec",
    "Forgetting",
    "ForgettingSpec",
    "GLASpec",
    "GatedDelta",
    "GatedDeltaSpec",
    "KDASpec",
    "KernelAttention",
    "KernelAttentionSpec",
    "Lightning",
    "LightningSpec",
    "LongConv",
    "LongConvSpec",
    "MLASpec",
    "MLSTMSpec",
    "Mamba",
    "Mamba2",
    "Mamba2Spec",
    "Mamba3",
    "Mamba3Spec",
    "MambaSpec",
    "Parallel",
    "ParallelSpec",
    "RGLRUSpec",
    "RWKV4Spec",
    "RWKV5Spec",
    "RWKV6Spec",
    "RWKV7Spec",
    "Retention",
    "RetentionSpec",
    "Routed",
    "RoutedSpec",
    "S4DSpec",
    "S4Spec",
    "S5Spec",
    "SLSTMSpec",
    "SequenceRouted",
    "SequenceRoutedSpec",
    "ShortConv",
    "ShortConvSpec",
]
