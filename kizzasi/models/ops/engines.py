"""The implementations of an op, by name, and the rule by which "auto" chooses among them.

    reference  the defining loop
    torch      fast, on every device that torch knows
    native     compiled C, on a CPU
    triton     Triton's kernels, on CUDA

The rule (`PREFERRED`): the first of its device's list that the op has and that can be imported.
It looks at where the inputs are, so a model that moves takes what is best there. A name that is
asked for is taken or refused, never swapped.

One thing besides: kernels see memory and nothing else. Where torch looks on (torch.compile and
export, torch.func, forward mode, a dispatch mode that counts or fakes), a call of "native" or
"triton" takes the torch form, and so do its derivatives beyond the first; `observed` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Generic, Literal, TypeVar

import torch

from kizzasi.errors import SpecError
from kizzasi.models.ops.autodiff import observed

Engine = Literal["auto", "reference", "torch", "native", "triton"]
NAMES = ("reference", "torch", "native", "triton")
PREFERRED: Mapping[str, tuple[str, ...]] = {"cpu": ("native",), "cuda": ("triton",)}
DEVICES = {"native": "cpu", "triton": "cuda"}

F = TypeVar("F", bound=Callable[..., object])


class Engines(Generic[F]):
    """One op's engines.

    Args:
        op: its name, for messages.
        reference, torch: the functions, of one signature.
        native, triton: further ones, as "module:function", imported when first asked for.
    """

    def __init__(
        self,
        op: str,
        *,
        reference: F,
        torch: F,
        native: str | None = None,
        triton: str | None = None,
    ) -> None:
        self.op = op
        self._ready: dict[str, F] = {"reference": reference, "torch": torch}
        given = {"native": native, "triton": triton}
        self._later = {name: where for name, where in given.items() if where is not None}
        self._missing: dict[str, ImportError] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """What may be asked for, besides "auto"."""
        return tuple(name for name in NAMES if name in self._ready or name in self._later)

    def resolve(self, wanted: str, device: torch.device) -> str:
        """The name of the engine that runs on inputs there.

        Raises:
            SpecError: the one asked for is missing, cannot be imported or runs elsewhere only.
        """
        if wanted == "auto":
            fast = (n for n in PREFERRED.get(device.type, ()) if n in self._later and self._load(n))
            return next(fast, "torch")
        if wanted not in self.names:
            raise SpecError(
                f"engine: {self.op} has no {wanted!r}; choose auto or one of {list(self.names)}"
            )
        if DEVICES.get(wanted, device.type) != device.type:
            raise SpecError(
                f'engine: {wanted!r} runs on {DEVICES[wanted]}, not on {device}; use "auto"'
            )
        if wanted in self._later and self._load(wanted) is None:
            raise SpecError(
                f"engine: {wanted!r} of {self.op} cannot be imported here: {self._missing[wanted]}"
            )
        return wanted

    def pick(self, wanted: str, device: torch.device) -> F:
        """The function that `resolve` names, for a call that is made now."""
        if observed() and wanted in ("auto", *self._later):
            wanted = "torch"
        return self._ready[self.resolve(wanted, device)]

    def _load(self, name: str) -> F | None:
        if name not in self._ready and name not in self._missing:
            module, function = self._later[name].split(":")
            try:
                self._ready[name] = getattr(import_module(module), function)
            except ImportError as error:
                self._missing[name] = error
        return self._ready.get(name)
