"""Whether a training can fit at all, before anything is built: a lower bound of what it holds.

    weights, gradients, optimiser     4 n (2 + s) bytes;  s = 2 states a parameter (adamw), 1 (muon)
    one part of a step's windows      4 d t bytes for the input of every block, which its norm
                                      keeps, and 4 v t for logits; half where autocast may halve it

n parameters, d = d_model, v = width of the stem's head, t tokens of a part. What mixers, channels
and the loss keep comes on top, so whoever is refused here could not have trained.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Signal, Tokens
from kizzasi.train.distributed import ALONE, Ranks
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


def training_bytes(spec: ModelSpec, recipe: Recipe, ranks: Ranks = ALONE) -> tuple[int, int]:
    """What one process of a training holds at least: (weights, gradients and optimiser), (one
    part's windows)."""
    fixed = 4 * spec.cost(1).params * (2 + STATES[recipe.optimizer])
    width = 4 if recipe.precision == "fp32" else 2
    tokens = recipe.tokens_per_step // recipe.accumulate // ranks.world
    n = sum(isinstance(block, BlockSpec) for block in spec.blocks)
    kept = spec.d_model * n + (0 if spec.heads else _head(spec.stem))
    return fixed // (ranks.world if ranks.how == "fsdp" else 1), width * kept * tokens


def _head(stem: object) -> int:
    """Numbers that a stem's head returns for each token; 0 of a stem that is not ours."""
    if isinstance(stem, Tokens):
        return stem.vocab_size
    return stem.n_out if isinstance(stem, Signal) else 0


def require_memory(
    spec: ModelSpec,
    recipe: Recipe,
    device: torch.device | str = "cpu",
    limit: int | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Refuse a training that plainly cannot fit.

    Args:
        spec, recipe: of the training.
        device: whose free memory counts.
        limit: bytes that it may take, where that is less.
        ranks: the processes that share the training; those of this machine share its memory.

    Raises:
        SpecError: names what is needed, what is there, and what to change.
    """
    fixed, batch = training_bytes(spec, recipe, ranks)
    if torch.device(device).type == "cpu":
        fixed, batch = fixed * ranks.beside, batch * ranks.beside
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
