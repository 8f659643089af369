"""What all layers of one call have in common, made when a layer first asks for it.

b, t      rows and tokens of the call; a step has one token
document  which document of a row a token belongs to: 0 continues the carried state, 1, 2, ...
          start in this call
position  place within the document, from 0
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from kizzasi.models.ops.attention import document_positions

T = TypeVar("T")
HERE = -1  # in `Call.lent`: the layer itself; its keys and values are of an iterate before


class Call:
    """One call of a model, or of a mixer by itself, as its layers see it.

    Args:
        shape: (b, t).
        device: of the inputs.
        segments: (b, t) int64, None if every token continues the state. 0 continues the carried
            state; every change of value along t starts a document from the zero state; -1 is
            padding.
        step: whether the layers see one token, (b, d), and run their recurrent form.
        coded: whether layers may send codes of what is to come, and say what they cost.

    Attributes:
        shared: what earlier layers have offered to later ones (RWKV-7's v_first).
        lent: of layers of the same stack that later ones name, by what and which: ("memory", 3) is
            the stream after layer 3, ("kv", 3) what its mixer lent (`MixerOut.lent`). With HERE
            for the index, what this layer alone is lent.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        device: torch.device,
        *,
        segments: Tensor | None = None,
        step: bool = False,
        coded: bool = False,
    ) -> None:
        self.shape, self.device, self.step, self.coded = shape, device, step, coded
        self.segments = segments
        self.shared: Mapping[str, Tensor] = {}
        self.lent: Mapping[tuple[str, int], Any] = {}
        self._made: dict[Hashable, object] = {}

    @classmethod
    def of(cls, x: Tensor, segments: Tensor | None = None, *, step: bool = False) -> Call:
        """The call of a layer by itself on x (b, t, d), or in a step on x (b, d)."""
        return cls((len(x), 1 if step else x.shape[1]), x.device, segments=segments, step=step)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made by the first of all layers that ask for this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # pyright: ignore[reportReturnType]

    @property
    def starts(self) -> Tensor | None:
        """(b, t) bool: True where a token must not see what came before it; None if nowhere."""
        segments = self.segments
        return None if segments is None else self.once("starts", lambda: document_starts(segments))

    @property
    def real(self) -> Tensor | None:
        """(b, t) bool: False at padding; None if there is none."""
        segments = self.segments
        return None if segments is None else self.once("real", lambda: segments >= 0)

    def places(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """Document and position of every token; padding counts as a document of its own.

        Args:
            start: (b,) int64, or (1,) for all rows, position of a row's first token if it continues
                the state.

        Returns:
            Two (b, t) int64, or (1, t) if start has one row and no segments set rows apart.
        """
        if self.starts is None:
            index = torch.arange(self.shape[1], device=self.device)
            position = index + start[:, None]
            return torch.zeros_like(position), position
        return document_positions(self.starts, start)

    def offering(self, shared: Mapping[str, Tensor]) -> Call:
        """The same call for later layers, to which `shared` is offered too."""
        return self._with({**self.shared, **shared}) if shared else self

    def lending(self, lent: Mapping[tuple[str, int], Any]) -> Call:
        """The same call for later layers of a stack, to which this is lent and nothing else."""
        call = self._with(self.shared)
        call.lent = lent
        return call

    def alone(self) -> Call:
        """The same call for a layer that takes nothing from others."""
        return self._with({}) if self.shared else self

    def forgetful(self) -> Call:
        """The same call without what was made."""
        call = self._with(self.shared)
        call._made = {}
        return call

    def _with(self, shared: Mapping[str, Tensor]) -> Call:
        call = Call(
            self.shape, self.device, segments=self.segments, step=self.step, coded=self.coded
        )
        call.shared, call.lent, call._made = shared, self.lent, self._made
        return call

    def rows(self, index: Tensor) -> Call:
        """The call on some rows, for a layer that takes nothing from others."""
        segments = None if self.segments is None else self.segments.index_select(0, index)
        shape = len(index), self.shape[1]
        return Call(shape, self.device, segments=segments, step=self.step)


def document_starts(segments: Tensor) -> Tensor:
    """(b, t) bool: True where a token must not see what came before it.

    The first token is compared with 0, the id that continues the carried state.
    """
    before = torch.cat([torch.zeros_like(segments[:, :1]), segments[:, :-1]], dim=1)
    return segments != before
