"""The contract of a layer: what stands in `ModelSpec.blocks`, and what a new topology defines.

A layer maps the residual stream (b, t, d) to the residual stream. A topology is one file beside
this one with a spec, a state and a module, and one import line in `__init__.py`:

1. `@register @dataclass(frozen=True) class LoopSpec(LayerSpec)` with `kind: ClassVar[str]`. Layers
   inside are fields of type `tuple[LayerSpec, ...]`, called stacks; mixers and channels inside are
   fields of type MixerSpec or ChannelSpec. What is declared so is found by `parts`, `check`,
   `settle`, `causal`, the leak gate, the searches and the exams without another line.
   It defines
       build(context, eps, dropout)   its module; the norms' eps and the model's dropout go inside
       cost(context, seq_len, batch)  all of it, norms too: parameters once, flops as often as run
   and, where the defaults of the base do not say it,
       check(d_model, path)      its own rules; `super().check` asks what is inside
       check_after(layers, path) rules about earlier layers of its stack that it names
       settle(offered, path)     if what is inside shares tensors with other layers otherwise than
                                 in the order of the fields (RWKV-7's value residual)
       depth                     residual layers that an input passes through: for initialisations
       context_window, causal    see `MixerSpec`; `window_of` gives the window of a stack
       encodes                   True where it sends a code of what is to come (`latent`)
       fixed_work                False where the tokens decide how much is done
2. A state: a NamedTuple of tensors with the batch first, tuples and NamedTuples of such, () for
   nothing. Before any token floats are zero. Integers start at 0, or at -1 for dead slots, and
   padding leaves them there.
3. `class Loop(LayerModule)`: `parallel(x, state, call)` serves x (b, t, d) and, unless `recurrent`
   is defined too, in a step x (b, d); what is inside follows `call.step` by itself. Stacks are
   `Stack.of(specs, context, eps, dropout)`, which run by `self.body(x, states, call)`. It defines
   `init_state` and, for parameters of its own, `reset_parameters` (and `param_rules`, `matrices`,
   `float32_parameters`; see `Mixer`). Documents and padding are the call's: `call.starts`,
   `call.real`; a call of another length is another `Call`.

`kizzasi.testing.check_layer(spec)` is the exam.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar, get_args

import torch
from torch import Tensor

from kizzasi.errors import SpecError
from kizzasi.models.call import Call
from kizzasi.models.cost import Cost
from kizzasi.models.mixer import ChannelSpec, LayerContext, Mixer, MixerOut, MixerSpec
from kizzasi.models.parts.turns import Taps
from kizzasi.strict import Registered, Strict, field_types, join, require

Part = MixerSpec | ChannelSpec
Self = TypeVar("Self", bound="LayerSpec")


class LayerSpec(Registered):
    """Base of layer specs: frozen dataclasses registered under `kind`. Without a kind it is a
    plain `BlockSpec`."""

    registry: ClassVar[dict[str, type]] = {}
    plain_kind: ClassVar[str | None] = "block"

    @abstractmethod
    def build(self, context: LayerContext, eps: float, dropout: float) -> LayerModule:
        """The module of this spec at a place in a model.

        Args:
            context: where it stands.
            eps: epsilon of its norms.
            dropout: probability, on each residual branch, in training.
        """

    @abstractmethod
    def cost(self, context: LayerContext, seq_len: int, batch: int) -> Cost:
        """What it costs over (batch, seq_len) tokens, its norms included; see `Cost`."""

    def coding_flops(self, context: LayerContext, seq_len: int, batch: int) -> int:
        """What `cost` leaves out: of what runs only where the layer encodes; see `encodes`."""
        return 0

    def check(self, d_model: int, path: str) -> None:
        """Raise SpecError for every rule that the fields break at this width."""
        for name, value in self.inside():
            if isinstance(value, tuple):
                check_stack(value, d_model, join(path, name))
                codes = [i for i, layer in enumerate(value) if layer.encodes]
                where = f"{join(path, name)}{codes}"
                require(not codes, where, "latent bits inside a layer; give them to the model")
            else:
                value.check(d_model, join(path, name))

    def check_after(self, earlier: Sequence[LayerSpec], path: str) -> None:
        """Raise SpecError for every rule that breaks after these layers of the same stack."""

    def settle(self: Self, offered: bool, path: str = "") -> tuple[Self, bool]:
        """What the layers before decide, written out; see `MixerSpec.settle`."""
        settled: dict[str, Any] = {}
        for name, value in self.inside():
            if isinstance(value, tuple):
                settled[name], offered = settle_stack(value, offered, join(path, name))
            elif isinstance(value, MixerSpec):
                settled[name], offered = value.settle(offered, join(path, name))
        new = {name: value for name, value in settled.items() if value is not getattr(self, name)}
        return (replace(self, **new) if new else self), offered  # pyright: ignore[reportArgumentType]

    def in_training(self: Self) -> Self:
        """The layer with as much work as training does, where that is another: in loops."""
        stacks = ((name, value) for name, value in self.inside() if isinstance(value, tuple))
        trained = {name: tuple(one.in_training() for one in stack) for name, stack in stacks}
        return replace(self, **trained) if trained else self  # pyright: ignore[reportArgumentType]

    def inside(self) -> Iterator[tuple[str, tuple[LayerSpec, ...] | Part]]:
        """The fields that are stacks, mixers or channels, by name, in their order."""
        for name, stack in _insides(type(self)):
            value = getattr(self, name)
            if stack or isinstance(value, (MixerSpec, ChannelSpec)):
                yield name, value

    def parts(self, path: str = "") -> Iterator[tuple[str, Part]]:
        """Every mixer and channel at any depth with its path, for example "body[1].mixer"."""
        for name, value in self.inside():
            if isinstance(value, tuple):
                for i, layer in enumerate(value):
                    yield from layer.parts(f"{join(path, name)}[{i}]")
            else:
                yield join(path, name), value

    @property
    def sources(self) -> Mapping[str, int]:
        """The earlier layers of its stack that it reads; see `MixerSpec.sources`."""
        return {}

    def lends(self, d_model: int) -> tuple[tuple[str, object], ...] | None:
        """What the keys and values look like that it can lend; see `MixerSpec.lends`."""
        return None

    @property
    def crosses(self) -> bool:
        """Whether `Stack.forward` can give it a stream for its keys and values; see `MixerSpec`."""
        return False

    def taps(self, d_model: int) -> Taps:
        """Where a layer around it may turn what it makes: of a block "norm", and see
        `MixerSpec.taps`."""
        return {}

    def reading(self: Self, source: int) -> Self:
        """The same layer with the keys and values of another; see `MixerSpec.reading`."""
        raise SpecError(f"{self.kind}: it has no keys and values of its own; name attention")

    @property
    def shares(self) -> int | None:
        """The earlier layer of its stack whose module runs in its place; None for its own."""
        return None

    @property
    def depth(self) -> int:
        """How many residual layers an input passes through in it, one after the other."""
        return 1

    @property
    def context_window(self) -> float:
        """How many inputs up to and including the present one an output can depend on."""
        return math.inf

    @property
    def causal(self) -> bool:
        """False if an output depends on later inputs; see `MixerSpec.causal`."""
        return all(part.causal for _, part in self.parts())

    @property
    def encodes(self) -> bool:
        """Whether, in training and in a coded score, outputs depend on what is yet to come, by a
        code whose nats of every token (b, t) the layer puts into `aux[CHARGE]` of a coded score."""
        return False

    @property
    def fixed_work(self) -> bool:
        """Whether flops and state follow from lengths alone, whatever the tokens are; else `cost`
        says what they are on average."""
        stacks = (value for _, value in self.inside() if isinstance(value, tuple))
        return all(layer.fixed_work for stack in stacks for layer in stack)


class LayerModule(Mixer):
    """Base of layers: a mixer of the residual stream, with its norms and residual inside.

    Attributes:
        sources, shares: of its spec.
        reads_start: whether it reads the stream before the first layer of its stack; see `Call`.
    """

    sources: Mapping[str, int] = {}  # read-only
    shares: int | None = None
    reads_start: bool = False

    @classmethod
    def admit(cls, spec: LayerSpec, layer: LayerContext, *_: Any, **__: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Raise SpecError unless the spec fits the place."""
        if not isinstance(layer, LayerContext):
            raise SpecError(f"context: expected a LayerContext(d_model), got {layer!r:.80}")
        spec.check(layer.d_model, "")

    def start(self, spec: LayerSpec, layer: LayerContext, *_: Any, **__: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.reset_parameters(layer.n_layers)

    def join(self, stack: Sequence[LayerModule]) -> None:
        """Take from the layers of its stack what it shares with an earlier one."""

    def recurrent(self, x: Tensor, state: Any, call: Call) -> MixerOut:
        """One token, x (b, d). Here: `parallel`, whose layers inside follow the call's form."""
        return self.parallel(x, state, call)

    @abstractmethod
    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """The state before any token; dtype is the activations'."""


Layers = tuple[LayerSpec, ...]


def places(layers: Layers, context: LayerContext) -> Iterator[LayerContext]:
    """Where each layer of a stack stands, the stack being at `context`."""
    index, lenders = context.index, {layer.sources.get("kv") for layer in layers}
    for i, layer in enumerate(_run(layers)):
        yield replace(context, index=index, lends=context.lends or i in lenders)
        index += layer.depth


def depth_of(layers: Layers) -> int:
    """Residual layers that an input passes through in a stack."""
    return sum(layer.depth for layer in _run(layers))


def check_stack(layers: Layers, d_model: int, path: str) -> None:
    """Raise SpecError for every rule that a stack of layers breaks at this width."""
    require(len(layers) > 0, path, "empty; give at least one block")
    for i, layer in enumerate(layers):
        where = f"{path}[{i}]"
        require(isinstance(layer, LayerSpec), where, f"expected a layer, got {layer!r:.80}")
        layer.check(d_model, where)
        layer.check_after(layers[:i], where)
        if layer.shares is not None:
            earlier = 0 <= layer.shares < i and layers[layer.shares].shares is None
            rule = f"{layer.shares} is no earlier layer with weights of its own"
            require(earlier, join(where, "layer"), f"{rule}; give an index below {i}")
        for what, source in layer.sources.items():
            _check_source(layers, d_model, path, i, what, source)
        for name, part in layer.parts(where):
            for mixer in _mixers(part):
                if mixer.sources and (mixer is not part or mixer.sources != layer.sources):
                    given = dict(mixer.sources)
                    raise SpecError(f"{name}: {given} names other layers; a block's mixer may")


def _check_source(layers: Layers, d_model: int, path: str, i: int, what: str, source: int) -> None:
    where = f"{path}[{i}].mixer.{what}_from"
    rule = f"{source} is no earlier layer of these; give an index from 0 to {i - 1}"
    require(0 <= source < i, where, rule)
    if what == "kv":
        own, given = layers[i].lends(d_model), layers[source].lends(d_model)
        rule = f"{path}[{source}] has no keys and values of its own; name a layer that makes them"
        require(given is not None and "kv" not in layers[source].sources, where, rule)
        theirs, ours = (dict(x or ()) for x in (given, own))
        differ = {name: (theirs[name], ours.get(name)) for name in theirs}
        differ = {name: pair for name, pair in differ.items() if pair[0] != pair[1]}
        rule = f"of {path}[{source}] and of this layer differ {differ}; make them equal"
        require(not differ, where, rule)


def _mixers(part: Strict) -> Iterator[MixerSpec]:
    """A part's mixers at any depth, itself included."""
    if isinstance(part, MixerSpec):
        yield part
    for name in _specs(type(part)):
        value = getattr(part, name)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, Strict):
                yield from _mixers(one)


@functools.cache
def _insides(cls: type[LayerSpec]) -> tuple[tuple[str, bool], ...]:
    """The fields of a layer that may be stacks, mixers or channels, and which are stacks."""
    hints = field_types(cls)
    return tuple((name, get_args(hints[name])[:1] == (LayerSpec,)) for name in _specs(cls))


@functools.cache
def _specs(cls: type[Strict]) -> tuple[str, ...]:
    """The fields of a class that may hold specs."""
    kinds = {name: (hint, *get_args(hint)) for name, hint in field_types(cls).items()}
    return tuple(
        name
        for name, hints in kinds.items()
        if any(isinstance(hint, type) and issubclass(hint, Strict) for hint in hints)
    )


def settle_stack(layers: Layers, offered: bool, path: str) -> tuple[Layers, bool]:
    """`LayerSpec.settle` of layers that run in this order."""
    settled: list[LayerSpec] = []
    for i, layer in enumerate(layers):
        layer, offered = layer.settle(offered, f"{path}[{i}]")
        settled.append(layer)
    same = all(new is old for new, old in zip(settled, layers, strict=True))
    return (layers if same else tuple(settled)), offered


def cost_of(layers: Layers, context: LayerContext, seq_len: int, batch: int) -> Cost:
    """What a stack costs that runs once."""
    total = Cost()
    for layer, run, place in zip(layers, _run(layers), places(layers, context), strict=True):
        cost = run.cost(place, seq_len, batch)
        total += cost if layer.shares is None else cost._replace(params=0, active_params=0)
    return total


def window_of(layers: Layers, times: int = 1) -> float:
    """How many inputs up to and including the present one the output of a stack can depend on,
    if it runs so many times."""
    return 1 + times * sum(layer.context_window - 1 for layer in _run(layers))


def _run(layers: Layers) -> Layers:
    """The layers whose modules run: of those that share another's weights, that other."""
    return tuple(layer if layer.shares is None else layers[layer.shares] for layer in layers)
