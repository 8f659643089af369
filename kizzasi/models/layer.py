"""`spec.layer(d_model)`: one mixer or channel in anyone's network, tensor in, tensor out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kizzasi.errors import ShapeError, SpecError
from kizzasi.models.call import Call
from kizzasi.models.init import Ready, materialize
from kizzasi.models.mixer import ChannelSpec, LayerContext, MixerSpec
from kizzasi.models.ops.devices import usable_device
from kizzasi.models.state import BlockState, ModelState, require_own
from kizzasi.models.through import through


class LayerOut(NamedTuple):
    """y like the input, the state after the last token, losses by name, already weighted."""

    y: Tensor
    state: ModelState
    aux: Mapping[str, Tensor]


class Layer(nn.Module, metaclass=Ready):
    """A mixer by itself: (b, t, d) to (b, t, d), without norm and residual.

        y = layer(x)                              in nn.Sequential as anywhere else
        y, state, aux = layer.stateful(x, state)  streams, packed documents, padding, losses

    Args:
        spec: of the mixer or channel.
        d_model: width of the input and of the output.
        index, n_layers: how deep it stands among how many, for initialisations that know (RWKV's
            ramps, scales of residual branches).
    """

    def __init__(
        self, spec: MixerSpec | ChannelSpec, d_model: int, index: int = 0, n_layers: int = 1
    ) -> None:
        super().__init__()
        self.spec, self.d_model, self.n_layers = spec, d_model, n_layers
        text = f"{d_model} {spec.canonical_json()}"
        self._digest = hashlib.sha256(text.encode()).hexdigest()
        part = spec.settle(offered=False)[0] if isinstance(spec, MixerSpec) else spec
        self.mixer = part.build(LayerContext(d_model, index, n_layers))

    @classmethod
    def admit(
        cls, spec: MixerSpec | ChannelSpec, d_model: int, index: int = 0, n_layers: int = 1
    ) -> None:
        if not isinstance(d_model, int) or d_model < 1:
            raise SpecError(f"d_model: expected a width of at least 1, got {d_model!r:.60}")
        if not 0 <= index < n_layers:
            raise SpecError(f"index: {index} is outside the {n_layers} layers; count from 0")
        spec.check(d_model, spec.kind)
        reads = dict(spec.sources) if isinstance(spec, MixerSpec) else {}
        if reads:
            raise SpecError(f"{spec.kind}: reads other layers, {reads}; it stands in a model only")

    def start(self, *_: Any, **__: Any) -> None:
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise all parameters; None draws from torch's own generator."""
        self.mixer.reset_parameters(self.n_layers, generator)

    def forward(
        self,
        x: Tensor,
        state: ModelState | None = None,
        *,
        segment_ids: Tensor | None = None,
        mask: Tensor | None = None,
        stateful: bool = False,
    ) -> Tensor | LayerOut:
        """(b, t, d) to (b, t, d); the other arguments are those of `stateful`, which returns more.

        Raises as `stateful` does.
        """
        if stateful or not (state is None and segment_ids is None and mask is None):
            out = self._stateful(x, state, segment_ids, mask)
            return out if stateful else out.y
        self._check(x, time=True)
        return self.mixer(x).y

    def stateful(
        self,
        x: Tensor,
        state: ModelState | None = None,
        *,
        segment_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> LayerOut:
        """Parallel form on x (b, t, d), recurrent form on one token x (b, d).

        Args:
            state: what an earlier call returned; None starts afresh.
            segment_ids, mask: as for `SequenceModel.forward`.

        Raises:
            ShapeError: x, segment_ids or mask do not fit.
            StateError: the state is another layer's.
            SpecError: a state or a step for a mixer that reads later tokens.
        """
        given = {"segment_ids": segment_ids, "mask": mask}
        return self(x, state, **given, stateful=True)  # a call, so that hooks act

    def _stateful(
        self,
        x: Tensor,
        state: ModelState | None,
        segment_ids: Tensor | None,
        mask: Tensor | None,
    ) -> LayerOut:
        step = isinstance(x, Tensor) and x.ndim == 2
        self._check(x, time=not step)
        if (step or state is not None) and not self.spec.causal:
            raise SpecError(
                f"{self.spec.kind}: a result depends on later tokens, which rules out a state and "
                "a step; give whole sequences"
            )
        if step and state is None:
            state = self.init_state(len(x), x.device, x.dtype)
        if state is not None:
            require_own(state, self._digest, len(x), partial(self.init_state, 1, "meta"))
        run = partial(through, causal=self.spec.causal, digest=self._digest, step=step)
        y, after, aux, sick = run(self._body, x, state, segment_ids, mask)
        y = y if sick is None else y.masked_fill(sick.unsqueeze(-1), torch.nan)
        return LayerOut(y, after, aux)

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ModelState:
        """The state before any input."""
        place = None if device is None else torch.device(device)
        mixer = self.mixer.init_state(batch_size, place, dtype)
        zeros = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return ModelState((BlockState(mixer, ()),), zeros, zeros, self._digest)

    def _body(
        self, x: Tensor, position: Tensor, before: Sequence[Any] | None, call: Call
    ) -> tuple[Tensor, tuple[BlockState, ...], Mapping[str, Tensor]]:
        if call.real is not None:  # what is hidden may be NaN
            x = x.masked_fill(~call.real.unsqueeze(-1), 0.0)
        out = self.mixer(x, None if before is None else before[0].mixer, call=call)
        return out.y, (BlockState(out.state, ()),), out.aux

    def _check(self, x: Tensor, *, time: bool) -> None:
        d = self.d_model
        wanted = f"(b, t, {d})" if time else f"(b, {d})"
        if not isinstance(x, Tensor):
            raise ShapeError(f"x: expected a tensor {wanted}, got a {type(x).__name__}")
        ok = x.ndim == 2 + time and x.shape[-1] == d and x.numel() > 0
        if not (ok and x.is_floating_point()):
            raise ShapeError(f"x: expected {wanted}, got {tuple(x.shape)} {x.dtype}")

    def extra_repr(self) -> str:
        return f"{self.spec.kind}, d_model={self.d_model}"


def build_layer(
    spec: MixerSpec | ChannelSpec,
    d_model: int,
    *,
    index: int = 0,
    n_layers: int = 1,
    seed: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """What `spec.layer` does.

    Args:
        seed: of the initialisation; None draws from torch's own generator (`torch.manual_seed`).
        device, dtype: None means torch's defaults.

    Raises SpecError if the spec does not fit d_model, or the device is missing.
    """
    home = torch.get_default_device() if device is None else usable_device(device)
    with torch.device("meta"):
        layer = Layer(spec, d_model, index, n_layers)
    if home.type != "meta":
        draw = None if seed is None else torch.Generator().manual_seed(seed)
        materialize(layer, lambda: layer.reset_parameters(draw))
    return layer.to(device=home, dtype=dtype or torch.get_default_dtype())
