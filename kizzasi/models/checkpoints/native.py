"""Our own format: config.json holds the spec, model.safetensors (or its shards) the weights.

Beside the spec, config.json may hold what is no part of the architecture: "tokenizer" and
"generation" (companions.py). The keys "model_type" and "architectures" are for transformers, whose
AutoClasses read the folder after `kizzasi.hf.register()`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from kizzasi.errors import CheckpointError, SpecError
from kizzasi.files import Make, write_files
from kizzasi.models.checkpoints.experts import native_links
from kizzasi.models.checkpoints.names import written
from kizzasi.models.checkpoints.storage.files import (
    earlier_weights,
    open_safetensors,
    read_json,
    require_equal,
    weight_files,
)
from kizzasi.models.checkpoints.weights import (
    compare,
    empty,
    fill,
    folder_with_no_model,
    shapes_of,
    taken,
)
from kizzasi.models.model import SequenceModel
from kizzasi.models.ops.engines import Engine
from kizzasi.models.spec import ModelSpec

CONFIG, WEIGHTS = "config.json", "model.safetensors"
NAME = "kizzasi"
FORMAT = f"{NAME}/1"
SHARD_BYTES = 5 * 10**9
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def save(
    model: SequenceModel,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = SHARD_BYTES,
    overwrite: bool = False,
    entries: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write config.json and the weights, and read them back before they get their names.

    Args:
        model: of any spec, its modules as the spec says.
        folder: made if need be.
        max_shard_size: bytes of a file of weights, or "500MB"; a larger model is cut in shards.
        overwrite: replace the model that the folder holds.
        entries: further ones of config.json.
        files: further files of the folder.

    Raises:
        CheckpointError: a model is there already, this one could not be loaded again, or the folder
            cannot be written.
    """
    folder = Path(folder)
    folder_with_no_model(folder, [CONFIG, *(p.name for p in earlier_weights(folder))], overwrite)
    spec = model.spec
    if ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))).digest != spec.digest:
        raise CheckpointError(f"{folder}: cannot save: the spec does not survive its own JSON")
    config = {
        "format": FORMAT,
        "model_type": NAME,
        "architectures": ["KizzasiForCausalLM"],
        "spec": spec.to_dict(),
        **(entries or {}),
    }
    write(folder, taken(model, folder), config, max_shard_size, files or {})


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    most: int | str,
    files: Mapping[str, bytes],
) -> None:
    """Weights, read back, and config.json; an earlier model's other files of weights go."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        makers, parts = weight_files(folder, tensors, shard_bytes(most))
        makers |= plain_files(folder, {**files, CONFIG: to_json(config)})

        def check(paths: Any) -> None:
            for path, part in zip(paths, parts, strict=False):
                require_equal(path, part)

        write_files(makers, check, earlier_weights(folder))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot write the checkpoint: {error}") from error


def plain_files(folder: Path, files: Mapping[str, bytes]) -> dict[Path, Make]:
    """What writes them."""

    def make(content: bytes) -> Make:
        return lambda file: file.write(content)

    return {folder / name: make(content) for name, content in files.items()}


def to_json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()


def shard_bytes(size: int | str) -> int:
    """Bytes of "5GB" and the like. Raises CheckpointError."""
    match = re.fullmatch(r"(\d+)\s*([KMG]B)?", str(size).upper())
    if isinstance(size, bool) or match is None or int(match[1]) == 0:
        raise CheckpointError(f'max_shard_size: {size!r}; give bytes, or a text such as "500MB"')
    return int(match[1]) * UNITS.get(match[2], 1)


def load(
    folder: Path,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    engine: Engine,
) -> SequenceModel:
    """See `kizzasi.models.load`. Shapes are compared before anything is allocated."""
    spec = read_spec(folder / CONFIG)
    path, storage = open_safetensors(folder)
    model = empty(spec, folder / CONFIG, device, engine)
    wanted = model.state_dict()
    links = native_links(wanted, storage.keys())
    compare(path, {name: s.shape for name, s in storage.items()}, shapes_of(written(links, wanted)))
    odd = next((n for n, s in storage.items() if s.dtype is None), None)
    if odd is not None:
        raise CheckpointError(f"{path}: {odd} is of a dtype that no model here has")
    return fill(model, links, storage, device, dtype)


def is_native(path: Path) -> bool:
    """Whether a config.json is one of ours, of whatever version. Raises CheckpointError."""
    config = read_json(path)
    return str(config.get("format")).startswith(NAME) or config.get("model_type") == NAME


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
