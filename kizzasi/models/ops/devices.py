"""Where a model goes, and where an op runs, as its rule asks: tests answer for devices that they do
not have."""

from __future__ import annotations

import torch
from torch import Tensor

from kizzasi.errors import SpecError
from kizzasi.models.ops.autodiff import transformed


def on_cpu(x: Tensor) -> bool:
    """A call costs little, and memory much."""
    return x.is_cpu


def on_cuda(x: Tensor) -> bool:
    return x.is_cuda


def eager() -> bool:
    """Values exist now: neither a compiler nor torch.func stands in between."""
    return not (torch.compiler.is_compiling() or transformed())


def answers(x: Tensor) -> bool:
    """A value of x may be asked for, and costs no wait."""
    return eager() and on_cpu(x)


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device of that name; None is the CPU. Raises SpecError unless it can be used here."""
    try:
        found = torch.device("cpu" if device is None else device)
        if found.type != "meta":
            torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SpecError(
            f"device: {device!r} cannot be used here ({reason:.80}); use {_others()}"
        ) from error
    return found


def _others() -> str:
    there = torch.accelerator.current_accelerator(check_available=True)
    return '"cpu"' if there is None else f'"{there.type}" or "cpu"'
