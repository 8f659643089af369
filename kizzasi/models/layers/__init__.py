"""What a layer of a model can be. One topology, one file; see `layer.py` for what each defines."""

from kizzasi.models.layers.aside import AsideSpec
from kizzasi.models.layers.block import BlockSpec
from kizzasi.models.layers.chunked import ChunkedSpec
from kizzasi.models.layers.condition import ConditionSpec
from kizzasi.models.layers.depth_routed import DepthRoutedSpec
from kizzasi.models.layers.downsample import DownsampleSpec
from kizzasi.models.layers.latent import LatentSpec
from kizzasi.models.layers.layer import LayerSpec
from kizzasi.models.layers.loop import LoopSpec
from kizzasi.models.layers.shared import SharedSpec

__all__ = [
    "AsideSpec",
    "BlockSpec",
    "ChunkedSpec",
    "ConditionSpec",
    "DepthRoutedSpec",
    "DownsampleSpec",
    "LatentSpec",
    "LayerSpec",
    "LoopSpec",
    "SharedSpec",
]
