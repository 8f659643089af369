"""Where a model goes."""

from __future__ import annotations

import torch

from kizzasi.errors import SpecError


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
