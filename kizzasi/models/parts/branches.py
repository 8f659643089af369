"""Mixers that read the same tokens side by side: what `parallel` and `routed` are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kizzasi.models.call import Call
from kizzasi.models.mixer import LayerContext, Mixer, MixerOut, MixerSpec, add_losses
from kizzasi.strict import join


class BranchesOut(NamedTuple):
    """What the branches return: all outputs; the rest as in `MixerOut`, state by state."""

    ys: list[Tensor]
    state: tuple[Any, ...]
    aux: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]


class Branches(nn.ModuleList):
    """They run in order and share tensors as the layers of a model do: of two RWKV-7 mixers side by
    side the first offers v_first, and the second takes it."""

    def __init__(self, specs: Sequence[MixerSpec], layer: LayerContext) -> None:
        super().__init__(spec.build(layer) for spec in specs)

    def forward(self, x: Tensor, state: tuple[Any, ...] | None, call: Call) -> BranchesOut:
        """Either form of all; arguments as in `Mixer.forward`."""
        ys: list[Tensor] = []
        states: list[Any] = []
        aux: Mapping[str, Tensor] = {}
        offered: Mapping[str, Tensor] = {}
        before = (None,) * len(self) if state is None else state
        for mixer, memory in zip(self.mixers, before, strict=True):
            out: MixerOut = mixer(x, memory, call=call.offering(offered))
            ys.append(out.y)
            states.append(out.state)
            aux, offered = add_losses(aux, out.aux), {**offered, **out.shared}
        return BranchesOut(ys, tuple(states), aux, offered)

    def init_state(
        self, batch: int, device: torch.device | None, dtype: torch.dtype | None
    ) -> tuple[Any, ...]:
        return tuple(mixer.init_state(batch, device, dtype) for mixer in self.mixers)

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None) -> None:
        for mixer in self.mixers:
            mixer.reset_parameters(n_layers, generator)

    @property
    def mixers(self) -> list[Mixer]:
        return list(self)  # pyright: ignore[reportReturnType]


def settle_all(
    mixers: Sequence[MixerSpec], offered: bool, path: str
) -> tuple[tuple[MixerSpec, ...], bool]:
    """`MixerSpec.settle` of mixers that run in this order and share tensors with other layers."""
    settled: list[MixerSpec] = []
    for i, mixer in enumerate(mixers):
        mixer, offered = mixer.settle(offered, join(path, f"mixers[{i}]"))
        settled.append(mixer)
    return tuple(settled), offered


def settle_alone(mixers: Sequence[MixerSpec], path: str) -> tuple[MixerSpec, ...]:
    """`MixerSpec.settle` of mixers that share nothing with others."""
    return tuple(
        mixer.settle(False, join(path, f"mixers[{i}]"))[0] for i, mixer in enumerate(mixers)
    )
