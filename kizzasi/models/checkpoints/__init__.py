"""Reading and writing checkpoints. `load` finds the format out."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from kizzasi.errors import CheckpointError
from kizzasi.models.checkpoints import foreign, gguf, native
from kizzasi.models.checkpoints.companions import Companions, companions_of
from kizzasi.models.checkpoints.families import llama
from kizzasi.models.checkpoints.families.rwkv_state import tuned_state
from kizzasi.models.checkpoints.gguf.vocabulary import to_gguf
from kizzasi.models.checkpoints.gguf.writer import Kind
from kizzasi.models.model import SequenceModel
from kizzasi.models.ops.engines import Engine
from kizzasi.models.spec import ModelSpec
from kizzasi.strict import unknown_name

__all__ = [
    "Companions",
    "companions_of",
    "foreign",
    "formats",
    "gguf",
    "llama",
    "load",
    "native",
    "save",
    "spec_of",
    "tuned_state",
]


def load(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    engine: Engine = "auto",
    quantized: bool = False,
) -> SequenceModel:
    """Load a checkpoint: one that `save` or `save_pretrained` wrote, one of `formats()`, or GGUF.

    The model is in evaluation mode, as after `model.eval()`.

    Args:
        path: a folder with config.json and weights, or a single file of weights that tells its
            format by the names in it.
        device, engine: as for `build_model`. Tensors go there one by one; the host needs no more
            memory than the file's size.
        dtype: None keeps the stored dtype; of several, the widest.
        quantized: keep the weights that a GGUF file stores in 4, 5 or 8 bits in that form, for fast
            decoding on the CPU. Scales, and inputs and outputs of those layers, are then rounded to
            bfloat16; see `kizzasi.models.checkpoints.quantized`. False reads every weight in full.

    Raises:
        CheckpointError: no checkpoint there, of an unknown format, damaged, with a config that asks
            for what this library lacks, or with tensors that do not fit the config.
    """
    path = Path(path)
    kind = _kind(path)
    if kind is gguf:
        options = {"device": device, "dtype": dtype, "engine": engine, "quantized": quantized}
        return gguf.read(path, **options).eval()
    if quantized:
        raise CheckpointError(f"{path}: quantized: only GGUF files hold such weights; leave it out")
    read = native.load if kind is native else foreign.read
    return read(path, device=device, dtype=dtype, engine=engine).eval()


def spec_of(path: str | os.PathLike[str]) -> ModelSpec:
    """The architecture of a checkpoint, as `load` would build it. No weights are read; those of a
    foreign format are there, by name and shape.

    Raises:
        CheckpointError: as for `load`.
    """
    path = Path(path)
    kind = _kind(path)
    if kind is native:
        return native.read_spec(path / native.CONFIG)
    if kind is gguf:
        family, spec, storage, _ = gguf.recognise(path)
    else:
        family, spec, storage = foreign.recognise(path)
    foreign.require_tensors(path, family, spec, storage)
    return spec


def _kind(path: Path) -> ModuleType:
    """The module that reads what is there."""
    config = path / native.CONFIG
    if not (path.is_file() or config.is_file()):
        raise CheckpointError(
            f"{path}: no {native.CONFIG} there; give a folder with one, or a file"
        )
    if path.is_file() and gguf.is_gguf(path):
        return gguf
    return native if config.is_file() and native.is_native(config) else foreign


def save(
    model: SequenceModel,
    folder: str | os.PathLike[str],
    format: str = native.NAME,
    *,
    max_shard_size: int | str = native.SHARD_BYTES,
    overwrite: bool = False,
    like: str | os.PathLike[str] | None = None,
    gguf_type: Kind = "F32",
) -> None:
    """Write a checkpoint folder or a GGUF file, and read it back before it gets its name.

    What a format cannot express is refused, but for the weights of losses that only training reads
    (a router's z-loss): those it has no key for are left out.

    Args:
        model: of any spec, if the format is our own; else of a spec that the format can express.
        folder: made if need be; for GGUF a file that ends in .gguf.
        format: "kizzasi", or one of `formats()`, such as "llama"; or "gguf".
        max_shard_size: bytes of a file of weights, or "500MB"; a larger model is cut in shards.
        overwrite: replace the model that the folder holds.
        like: a checkpoint whose tokenizer, special ids, longest document and settings of generation
            go along, as far as the format has a place for them: the one that this model came from.
        gguf_type: of matrices in GGUF; see `kizzasi.models.checkpoints.gguf.write`.

    Raises:
        CheckpointError: an unknown format, one that cannot express the model, a model that could
            not be loaded again (pruned, with adapters inside, layers cut), a folder that holds a
            model already or cannot be written.
    """
    options: Any = {"max_shard_size": max_shard_size, "overwrite": overwrite}
    along = Companions() if like is None else companions_of(Path(like))
    if format == gguf.NAME:
        vocab_size = llama.vocabulary(model.spec).vocab_size
        more = to_gguf(along.files, along.generation, vocab_size)
        gguf.write(model, folder, gguf_type, more=more, overwrite=overwrite)
    elif format == native.NAME:
        native.save(model, folder, entries=along.entries(), files=along.files, **options)
    elif format in foreign.FAMILIES:
        files = {**along.files, **along.generation_config()}
        ids = {key: value for key, value in along.generation.items() if key != "config"}
        foreign.write(model, folder, foreign.FAMILIES[format], ids=ids, files=files, **options)
    else:
        known = [*formats(), gguf.NAME]
        raise CheckpointError(f"format: {format!r} {unknown_name(format, known)}")


def formats() -> list[str]:
    """The formats that `load` finds out and `save` writes, our own first."""
    return [native.NAME, *sorted(foreign.FAMILIES)]
