"""The contract that every sequence mixer and channel mixer keeps.

A mixer maps (b, t, d) to (b, t, d). It has a parallel form, `forward`, and a recurrent form,
`step`, that agree; any split of a sequence with the state carried across equals one call.

State in, state out. A state is a NamedTuple (nested if need be) of tensors whose first dimension is
the batch. Before any token its floating leaves are zero; integer leaves say which slots are valid.
Nobody writes into a state that it was handed, and gradients flow into the initial and out of the
final state.

Symbols: b batch, t time, d d_model.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from kizzasi.errors import SpecError
from kizzasi.models.call import Call
from kizzasi.models.cost import Cost
from kizzasi.models.init import Ready
from kizzasi.models.norm import KeepFloat32
from kizzasi.models.ops.engines import Engines
from kizzasi.models.state import loadable
from kizzasi.strict import Registered, Strict

if TYPE_CHECKING:
    from kizzasi.models.layer import Layer
    from kizzasi.models.parts.turns import Tap


@dataclass(frozen=True)
class LayerContext:
    """Where in a model a mixer stands: what a spec needs to build or to cost it."""

    d_model: int
    index: int = 0  # 0-based depth
    n_layers: int = 1
    lends: bool = False  # whether a later layer reads this one's keys and values


class ParamRule(NamedTuple):
    """How the optimiser treats a parameter; see `SequenceModel.parameter_groups`."""

    decay: bool = True
    lr_scale: float = 1.0
    lr_max: float = math.inf


NO_DECAY = ParamRule(decay=False)
CHARGE = "charge"  # in `MixerOut.aux`, of a layer that encodes: see `LayerSpec.encodes`


class MixerOut(NamedTuple):
    """What a mixer returns.

    y       (b, t, d) from forward, (b, d) from step.
    state   the state after the last token.
    aux     scalar losses by name, already weighted; {} for almost all mixers.
    shared  tensors offered to later layers of the same call (RWKV-7's v_first); {} for almost all.
    lent    keys and values, of a mixer whose LayerContext.lends, for the later layers that name it.
    """

    y: Tensor
    state: Any
    aux: Mapping[str, Tensor] = {}  # read-only
    shared: Mapping[str, Tensor] = {}
    lent: Any = None


def add_losses(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Sum auxiliary losses by name."""
    if not (a and b):
        return a or b
    return {name: sum(d[name] for d in (a, b) if name in d) for name in {**a, **b}}  # pyright: ignore[reportReturnType]


class Mixer(KeepFloat32, metaclass=Ready):
    """Base of all mixers. Constructed from its spec and a LayerContext; see `Ready`.

    A mixer defines `parallel` and `recurrent`. Both are reached through the module's call alone, so
    that hooks, adapters, sharding and offloading act in a step as they do in training.

    Class attributes:
        float32_parameters: names never stored below float32 (decays, step sizes, routers).
        param_rules: optimiser rules for parameters of this module by name; for one without, see
            `kizzasi.models.groups`.
        matrices: names of matrices (..., rows, columns) that are no Linear layer's weight.
        fan_in: of parameters by name, the dimension that is summed over, where that is not the last
            of a matrix; see `kizzasi.models.mup`.
        ops: the tables of the ops whose engine it can choose; plain layers have none.

    Attributes:
        engine: which engine its ops run on; see `Engines`.
    """

    param_rules: ClassVar[Mapping[str, ParamRule]] = {}
    matrices: ClassVar[tuple[str, ...]] = ()
    fan_in: ClassVar[Mapping[str, int]] = {}
    ops: ClassVar[tuple[Engines[Any], ...]] = ()
    engine: str = "auto"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        loadable(vars(sys.modules[cls.__module__]))  # the states defined beside it

    def fused(self) -> Mapping[str, tuple[int, ...]]:
        """Of every matrix that is several below one another, by name: how many rows each has."""
        return {}

    @classmethod
    def admit(cls, spec: MixerSpec | ChannelSpec, layer: LayerContext, *_: Any) -> None:
        """Raise SpecError unless the spec fits the layer."""
        if not isinstance(layer, LayerContext):
            raise SpecError(
                f"layer: expected a LayerContext(d_model), got {layer!r:.80}; for a layer of your "
                "own network write spec.layer(d_model)"
            )
        spec.check(layer.d_model, spec.kind)

    def start(self, spec: MixerSpec | ChannelSpec, layer: LayerContext, *_: Any) -> None:
        self.reset_parameters(layer.n_layers)

    def forward(self, x: Tensor, state: Any = None, *, call: Call | None = None) -> MixerOut:
        """Run `parallel`, or if the call is a step, `recurrent`.

        Args:
            x: (b, t, d) with t >= 1, or (b, d) in a step.
            state: what an earlier call returned, or None for `init_state`.
            call: what all layers of a model's call have in common; None for a mixer by itself.
        """
        if call is None:
            call = Call.of(x)
        if not call.step:
            return self.parallel(x, state, call)
        if state is None:
            state = self.init_state(len(x), x.device, x.dtype)
        return self.recurrent(x, state, call)

    def step(self, x: Tensor, state: Any, *, call: Call | None = None) -> MixerOut:
        """Recurrent form: one token, x (b, d). Equals `forward` on x[:, None]."""
        return self(x, state, call=Call.of(x, step=True) if call is None else call)

    @abstractmethod
    def parallel(self, x: Tensor, state: Any, call: Call) -> MixerOut:
        """All tokens x (b, t, d) of a call. A state of None is the one before any token."""

    def recurrent(self, x: Tensor, state: Any, call: Call) -> MixerOut:
        """One token, x (b, d). Here: `parallel` on a stretch of one."""
        out = self.parallel(x[:, None], state, call)
        return out._replace(y=out.y[:, 0])

    @abstractmethod
    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """The state before any token; dtype is the activations'. Recurrent sums are kept in at
        least float32, whatever dtype says (`state_dtype`)."""

    @abstractmethod
    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        """Initialise every parameter and buffer as the paper does, drawing from `generator`."""


def state_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """float64 for float64 models, else float32: the dtype of recurrent sums."""
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)


class _Part(Registered):
    """A registered spec of something that sits in a layer."""

    def check(self, d_model: int, path: str) -> None:
        """Raise SpecError for every rule that the fields break at this width."""

    @abstractmethod
    def build(self, layer: LayerContext) -> Mixer:
        """The module of this spec at a place in a model."""

    @abstractmethod
    def cost(self, layer: LayerContext, seq_len: int, batch: int) -> Cost:
        """What it costs over (batch, seq_len) tokens, its norm aside; see `Cost`."""

    def layer(
        self,
        d_model: int,
        *,
        index: int = 0,
        n_layers: int = 1,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Layer:
        """An initialised layer for one's own network: tensor (b, t, d_model) in, the same out.

        Args:
            d_model: width.
            index, n_layers: how deep it stands, for initialisations that know.
            seed: None draws from torch's own generator.
            device, dtype: None means torch's defaults.

        Raises SpecError if the spec does not fit, or the device is missing.
        """
        from kizzasi.models.layer import build_layer

        place = {"index": index, "n_layers": n_layers}
        return build_layer(self, d_model, **place, seed=seed, device=device, dtype=dtype)  # pyright: ignore[reportArgumentType]

    @property
    def context_window(self) -> float:
        """How many tokens up to and including the present one an output can depend on."""
        return math.inf

    @property
    def coded(self) -> bool:
        """Whether its state, or that of a part of it, holds codes, through which no gradient
        passes."""
        return any(part.coded for part in parts_of(self))

    @property
    def causal(self) -> bool:
        """False if an output depends on later tokens. A model with such a part has a parallel form
        only: no step, no state carried over, no generation."""
        return True


def parts_of(spec: Strict) -> Iterator[_Part]:
    """The mixers and channels among the fields of a spec, alone or in a tuple."""
    for f in dataclasses.fields(spec):  # pyright: ignore[reportArgumentType]
        value = getattr(spec, f.name)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, _Part):
                yield each


class MixerSpec(_Part):
    """Base of sequence mixer specs: frozen dataclasses registered under `kind`."""

    registry: ClassVar[dict[str, type]] = {}
    elsewhere: ClassVar[Mapping[str, str]] = {"eml_attention": "kizzasi.eml"}

    def settle(self, offered: bool, path: str = "") -> tuple[MixerSpec, bool]:
        """What the layers before decide, written out: `ModelSpec.settled` asks every mixer in turn.

        Args:
            offered: whether a layer before has offered its value to later ones (RWKV-7).
            path: of this spec, for errors.

        Returns:
            The spec without open choices, and whether a value is offered from here on.
        """
        return self, offered

    @property
    def sources(self) -> Mapping[str, int]:
        """The earlier layers of its stack that it reads: the index by "kv" (their keys and values,
        `Call.lent`) or "memory" (the stream after them)."""
        return {}

    def lends(self, d_model: int) -> tuple[tuple[str, object], ...] | None:
        """What a reader's queries must have in common with the keys and values that it can lend,
        by name; None if there are none."""
        return None

    @property
    def crosses(self) -> bool:
        """Whether its keys and values can be made of a stream beside x, which the call lends it as
        `Call.lent["memory", HERE]`, normalised as x is."""
        return False

    def taps(self, d_model: int) -> Mapping[str, Tap]:
        """Where a layer around it may turn what it makes: its queries "q" and values "v"."""
        return {}

    def reading(self, source: int) -> MixerSpec:
        """The same mixer with the keys and values of a layer in place of its own."""
        raise SpecError(f"{self.kind}: it has no keys and values of its own; name attention")


class ChannelSpec(_Part):
    """Base of channel mixer specs: frozen dataclasses registered under `kind`."""

    registry: ClassVar[dict[str, type]] = {}
