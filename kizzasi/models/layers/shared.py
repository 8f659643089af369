"""One set of weights in several layers: a layer that runs an earlier one's module again.

The parameters exist once, under the earlier layer's name; each use has its own state.

Source: ALBERT, Lan et al. 2019, arXiv:1909.11942; one attention block in several places, Glorioso
et al. 2024, arXiv:2405.16712 (Zamba).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kizzasi.models.call import Call
from kizzasi.models.cost import Cost
from kizzasi.models.layers.layer import LayerModule, LayerSpec
from kizzasi.models.mixer import LayerContext, MixerOut
from kizzasi.strict import register


@register
@dataclass(frozen=True)
class SharedSpec(LayerSpec):
    """The layer `layer` of the same stack again, with the same weights and a state of its own.

    Args:
        layer: index, from 0, of an earlier layer.
    """

    kind: ClassVar[str] = "shared"
    layer: int

    @property
    def shares(self) -> int:
        return self.layer

    def build(self, context: LayerContext, eps: float, dropout: float) -> Shared:
        return Shared(self, context)

    def cost(self, context: LayerContext, seq_len: int, batch: int) -> Cost:
        return Cost()  # `cost_of` asks the layer that runs


class Shared(LayerModule):
    """Holds the place of a layer that runs elsewhere; see `Stack.run`."""

    def __init__(self, spec: SharedSpec, context: LayerContext) -> None:
        super().__init__()
        self.shares = spec.layer

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        """It has none."""

    def parallel(self, x: Tensor, state: object, call: Call) -> MixerOut:
        raise AssertionError("a stack runs the layer that is shared")

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[()]:
        return ()

    def extra_repr(self) -> str:
        return f"layer {self.shares} again"
