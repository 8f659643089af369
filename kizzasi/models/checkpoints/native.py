"""Our own format: config.json holds the spec, model.safetensors the weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kizzasi.errors import CheckpointError, SpecError
from kizzasi.models.checkpoints.storage import read_json
from kizzasi.models.model import Backend, SequenceModel, build_model
from kizzasi.models.spec import ModelSpec

CONFIG, WEIGHTS = "config.json", "model.safetensors"
NAME = "kizzasi"
FORMAT = f"{NAME}/1"


def save(model: SequenceModel, folder: str | os.PathLike[str]) -> None:
    """Write both files; each replaces an old one in one move, so a crash leaves whole files.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    folder = Path(folder)
    config = {"format": FORMAT, "spec": model.spec.to_dict()}
    tensors = {name: t.detach().contiguous().cpu() for name, t in model.state_dict().items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / (WEIGHTS + ".partial")
        save_file(tensors, partial)
        os.replace(partial, folder / WEIGHTS)
        partial = folder / (CONFIG + ".partial")
        partial.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        os.replace(partial, folder / CONFIG)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot write the checkpoint: {error}") from error


def load(
    folder: Path,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    backend: Backend,
) -> SequenceModel:
    """See `kizzasi.models.load`. Shapes are compared before anything is allocated."""
    spec = read_spec(folder / CONFIG)
    tensors = read_tensors(folder / WEIGHTS, spec)
    stored = {t.dtype for name, t in tensors.items() if name.startswith("stem.")}
    model = build_model(spec, backend=backend, dtype=dtype or stored.pop())
    model.load_state_dict(tensors, strict=True)
    return model.to(device)


def is_native(path: Path) -> bool:
    """Whether a config.json is one of ours, of whatever version. Raises CheckpointError."""
    return str(read_json(path).get("format")).startswith(NAME)


def read_spec(path: Path) -> ModelSpec:
    """The spec inside a config.json. Raises CheckpointError."""
    config = read_json(path)
    if config.get("format") != FORMAT:
        raise CheckpointError(f'{path}: not a kizzasi checkpoint: "format" is not "{FORMAT}"')
    try:
        spec = ModelSpec.from_dict(config.get("spec", {}))
        spec.check()
    except SpecError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return spec


def read_tensors(path: Path, spec: ModelSpec) -> dict[str, Tensor]:
    """All tensors of a safetensors file, after its header agreed with the spec in every shape."""
    try:
        with safe_open(path, "pt") as file:
            shapes = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
            wanted = _meta(spec, path).state_dict()
            compare(path, shapes, {k: tuple(v.shape) for k, v in wanted.items()})
            return {name: file.get_tensor(name) for name in shapes}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: missing or damaged: {error}") from error


def _meta(spec: ModelSpec, path: Path) -> SequenceModel:
    try:
        return build_model(spec, device="meta")
    except SpecError as error:
        raise CheckpointError(f"{path}: cannot fit its config: {error}") from error


def compare(path: Path, given: dict[str, tuple], wanted: dict[str, tuple]) -> None:
    """Raise CheckpointError naming missing, unexpected and misshapen tensors."""
    faults = [f"missing {n}" for n in sorted(wanted.keys() - given.keys())]
    faults += [f"unexpected {n}" for n in sorted(given.keys() - wanted.keys())]
    both = sorted(given.keys() & wanted.keys())
    faults += [f"{n} is {given[n]}, not {wanted[n]}" for n in both if given[n] != wanted[n]]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(f"{path}: does not fit its config: {'; '.join(faults[:5])}{more}")
