"""Reading and writing checkpoints. `load` finds the format out."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from kizzasi.errors import CheckpointError
from kizzasi.models.checkpoints import native
from kizzasi.models.model import Backend, SequenceModel


def load(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> SequenceModel:
    """Load a checkpoint folder that `save_pretrained` wrote.

    Args:
        path: the folder.
        device, backend: as for `build_model`.
        dtype: None keeps the stored dtype.

    Raises:
        CheckpointError: no checkpoint there, damaged, or tensors that do not fit the config.
    """
    folder = Path(path)
    if not (folder / native.CONFIG).is_file():
        raise CheckpointError(f"{folder}: no {native.CONFIG} there; give a folder with one")
    return native.load(folder, device=device, dtype=dtype, backend=backend)
