"""Sequence models: specs in, `nn.Module`s out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kizzasi.models import channels, layers, mixers
from kizzasi.models.build import build_model
from kizzasi.models.cost import Cost
from kizzasi.models.decoding.batcher import Batcher
from kizzasi.models.decoding.decoder import Decoder
from kizzasi.models.decoding.generate import Generated
from kizzasi.models.decoding.sampling import Sampling
from kizzasi.models.decoding.streaming import SignalPredictor
from kizzasi.models.groups import lora_targets, parameter_groups, parameter_roles
from kizzasi.models.layer import Layer
from kizzasi.models.layers import BlockSpec, LayerSpec
from kizzasi.models.mixer import ChannelSpec, LayerContext, Mixer, MixerOut, MixerSpec
from kizzasi.models.model import ModelOutput, SequenceModel
from kizzasi.models.mup import mup_groups, mup_spec
from kizzasi.models.spec import ModelSpec, pattern
from kizzasi.models.state import ModelState, join_states, load_state
from kizzasi.models.stems import Signal, Tokens
from kizzasi.strict import register

if TYPE_CHECKING:
    from kizzasi.models import presets
    from kizzasi.models.checkpoints import load
    from kizzasi.models.checkpoints.quantized import quantize_weights

# Imported when first asked for: with the formats of checkpoints they take as long as all mixers.
LATER = {
    "load": "kizzasi.models.checkpoints",
    "presets": "kizzasi.models.presets",
    "quantize_weights": "kizzasi.models.checkpoints.quantized",
}


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(LATER[name])
    return module if LATER[name].endswith(f".{name}") else getattr(module, name)


def list_mixers() -> list[str]:
    """The kinds of sequence mixer that a spec may name."""
    return MixerSpec.known()


def list_channels() -> list[str]:
    """The kinds of channel mixer that a spec may name."""
    return ChannelSpec.known()


def list_layers() -> list[str]:
    """The kinds of layer that a spec may name; one without a kind is a "block"."""
    return LayerSpec.known()


__all__ = [
    "Batcher",
    "BlockSpec",
    "ChannelSpec",
    "Cost",
    "Decoder",
    "Generated",
    "Layer",
    "LayerContext",
    "LayerSpec",
    "Mixer",
    "MixerOut",
    "MixerSpec",
    "ModelOutput",
    "ModelSpec",
    "ModelState",
    "Sampling",
    "SequenceModel",
    "Signal",
    "SignalPredictor",
    "Tokens",
    "build_model",
    "channels",
    "join_states",
    "layers",
    "list_channels",
    "list_layers",
    "list_mixers",
    "load",
    "load_state",
    "lora_targets",
    "mixers",
    "mup_groups",
    "mup_spec",
    "parameter_groups",
    "parameter_roles",
    "pattern",
    "presets",
    "quantize_weights",
    "register",
]
