"""Whether a training can fit at all, before anything is built: a lower bound of what it holds.

    weights, gradients, optimiser     4 n (2 + s) bytes;  s = 2 states a parameter (adamw), 1 (muon)
    one part of a step's windows      4 d t bytes for the input of every block, which its norm
                                      keeps; 2 d t where autocast may halve it

n parameters, d = d_model, t tokens of a part. What mixers, channels and the loss keep comes on top,
so whoever is refused here could not have trained.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec
from kizzasi.train.recipe import Recipe

STATES = {"adamw": 2, "muon": 1}
GIB = 2**30


def free_bytes(device: torch.device | str = "cpu") -> int:
    """Memory that a device has free; 2^62 where nobody says."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = 2**62
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        told = next(line for line in lines if line.startswith("MemAvailable:"))
        free = int(told.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError):  # "max", or no such group
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return free


def training_bytes(spec: ModelSpec, recipe: Recipe) -> tuple[int, int]:
    """What a training holds at least: (weights, gradients and optimiser), (one part's windows)."""
    fixed = 4 * spec.cost(1).params * (2 + STATES[recipe.optimizer])
    width = 4 if recipe.precision == "fp32" else 2
    tokens = recipe.tokens_per_step // recipe.accumulate
    n = sum(isinstance(block, BlockSpec) for block in spec.blocks)
    return fixed, width * spec.d_model * tokens * n


def require_memory(
    spec: ModelSpec, recipe: Recipe, device: torch.device | str = "cpu", limit: int | None = None
) -> None:
    """Refuse a training that plainly cannot fit.

    Args:
        spec, recipe: of the training.
        device: whose free memory counts.
        limit: bytes that it may take, where that is less.

    Raises:
        SpecError: names what is needed, what is there, and what to change.
    """
    fixed, batch = training_bytes(spec, recipe)
    free = free_bytes(device)
    have = free if limit is None else min(free, limit)
    if fixed + batch <= have:
        return
    remedy = "take a smaller model" if fixed > have else "lower batch_size or seq_len"
    windows = recipe.batch_size // recipe.accumulate
    place = "the limit allows" if have == limit else f"{device} has free"
    raise SpecError(
        f"a training needs {(fixed + batch) / GIB:.3g} GiB at least: {fixed / GIB:.3g} for "
        f"weights, gradients and {recipe.optimizer}, {batch / GIB:.3g} for {windows:,} windows of "
        f"{recipe.seq_len:,}; {place} {have / GIB:.3g} GiB; {remedy}"
    )
