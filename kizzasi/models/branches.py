"""Mixers that read the same tokens side by side: what `parallel` and `routed` are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kizzasi.models.mixer import LayerContext, Mixer, MixerOut, MixerSpec, add_losses


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
        super().__init__(
            spec.build(place) for spec, place in zip(specs, layer.place(specs), strict=True)
        )

    def forward(
        self,
        x: Tensor,
        state: tuple[Any, ...] | None,
        segment_ids: Tensor | None,
        shared: Mapping[str, Tensor] | None,
    ) -> BranchesOut:
        """Parallel form of all; arguments as in `Mixer.forward`."""
        states = (None,) * len(self) if state is None else state
        pairs = zip(self.mixers, states, strict=True)
        return _run((partial(m, x, s, segment_ids=segment_ids) for m, s in pairs), shared)

    def step(
        self, x: Tensor, state: tuple[Any, ...], shared: Mapping[str, Tensor] | None
    ) -> BranchesOut:
        """Recurrent form of all; arguments as in `Mixer.step`."""
        pairs = zip(self.mixers, state, strict=True)
        return _run((partial(m.step, x, s) for m, s in pairs), shared)

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


def kinds_with(kind: str, mixers: Sequence[MixerSpec]) -> frozenset[str]:
    """`MixerSpec.kinds` of a composite whose mixers share tensors with other layers."""
    return frozenset({kind}).union(*(mixer.kinds for mixer in mixers))


def _run(
    calls: Iterable[Callable[..., MixerOut]], shared: Mapping[str, Tensor] | None
) -> BranchesOut:
    ys: list[Tensor] = []
    states: list[Any] = []
    aux: Mapping[str, Tensor] = {}
    offered: Mapping[str, Tensor] = {}
    for call in calls:
        out = call(shared={**(shared or {}), **offered})
        ys.append(out.y)
        states.append(out.state)
        aux, offered = add_losses(aux, out.aux), {**offered, **out.shared}
    return BranchesOut(ys, tuple(states), aux, offered)
