"""Layers that run one after the other: those of a model, and those inside a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kizzasi.models.call import HERE, Call
from kizzasi.models.layers.layer import LayerModule, LayerSpec, places
from kizzasi.models.mixer import LayerContext, MixerOut, add_losses
from kizzasi.models.parts.turns import TURNS, Turns


class StackOut(NamedTuple):
    """The stream after the last layer, a state per layer, and what each lent; the rest as in
    `MixerOut`."""

    x: Tensor
    state: tuple[Any, ...]
    aux: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    lent: tuple[Any, ...] = ()


class Stack(nn.ModuleList):
    """The modules of layers, in order.

    What one offers (`MixerOut.shared`) all later ones see, here and after; what one lends, or puts
    out, only the layers of this stack that name it.
    """

    def __init__(self, layers: Iterable[nn.Module] = ()) -> None:
        super().__init__(layers)
        self.lenders = {i for layer in self.layers for i in layer.sources.values()}
        self.lends_start = any(layer.reads_start for layer in self.layers)
        for layer in self.layers:
            layer.join(self.layers)

    @classmethod
    def of(
        cls, layers: tuple[LayerSpec, ...], context: LayerContext, eps: float, dropout: float
    ) -> Stack:
        """The modules of these specs; arguments as for `LayerSpec.build`."""
        at = zip(layers, places(layers, context), strict=True)
        return cls(layer.build(place, eps, dropout) for layer, place in at)

    def forward(
        self,
        x: Tensor,
        state: Sequence[Any] | None,
        call: Call,
        *,
        n_layers: int | None = None,
        recompute: bool = False,
        borrowed: Sequence[Any] | None = None,
        memory: Tensor | None = None,
        turns: Sequence[Turns] = (),
    ) -> StackOut:
        """Either form.

        Args:
            x: (b, t, d), or (b, d) in a step.
            state: of every layer; None starts afresh.
            n_layers: run the first so many alone; None means all.
            recompute: keep only the input of every layer, which backward runs again.
            borrowed: what every layer lent in an earlier run, and reads again.
            turns: of the first so many layers, what turns their norms, queries and values.
            memory: like x: what the first layer, which `crosses`, makes its keys and values of.
        """
        states: list[Any] = []
        lent: list[Any] = []
        aux: Mapping[str, Tensor] = {}
        offered: Mapping[str, Tensor] = {}
        before = (None,) * len(self) if state is None else state
        call = call.lending({}) if call.lent else call
        call = call.lending({("start", 0): x}) if self.lends_start else call
        for i, (layer, past) in list(enumerate(zip(self.run, before, strict=True)))[:n_layers]:
            run = partial(_recomputed, layer) if recompute else layer
            own: dict[Any, Any] = {} if borrowed is None else {("kv", HERE): borrowed[i]}
            if i < len(turns) and turns[i]:
                own[TURNS] = turns[i]
            if memory is not None and i == 0:
                own["memory", HERE] = memory
            out: MixerOut = run(x, past, call=call.lending({**call.lent, **own}) if own else call)
            x, aux, call = out.y, add_losses(aux, out.aux), call.offering(out.shared)
            states.append(out.state)
            lent.append(out.lent)
            if i in self.lenders:
                call = call.lending({**call.lent, ("kv", i): out.lent, ("memory", i): x})
            if out.shared:
                offered = {**offered, **out.shared}
        return StackOut(x, tuple(states), aux, offered, tuple(lent))

    def init_state(
        self, batch: int, device: torch.device | None, dtype: torch.dtype | None
    ) -> tuple[Any, ...]:
        return tuple(layer.init_state(batch, device, dtype) for layer in self.run)

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None) -> None:
        for layer in self.layers:
            layer.reset_parameters(n_layers, generator)

    @property
    def layers(self) -> list[LayerModule]:
        return list(self)  # pyright: ignore[reportReturnType]

    @property
    def independent(self) -> bool:
        """Whether every layer runs its own module, and names no other layer."""
        apart = not self.lenders and not self.lends_start
        return apart and all(layer.shares is None for layer in self.layers)

    @property
    def run(self) -> list[LayerModule]:
        """The modules that run: of layers that share another's weights, that other."""
        layers = self.layers
        return [layer if layer.shares is None else layers[layer.shares] for layer in layers]


def _recomputed(layer: nn.Module, x: Tensor, memory: Any, call: Call) -> MixerOut:
    """A layer that backward runs again. In a graph it makes for itself what all layers have in
    common, for a graph's checkpoint may write to nothing outside."""

    def run(x: Tensor, memory: Any) -> MixerOut:
        return layer(x, memory, call=call.forgetful() if torch.compiler.is_compiling() else call)

    return checkpoint(run, x, memory, use_reentrant=False)  # pyright: ignore[reportReturnType]
