"""Checkpoints of other programs: one small declarative `Family` per format.

To add a family, write a file beside this one:

1. `spec(config, shapes) -> ModelSpec`: take every key by `config.get/count/choose/only/within` (or
   `config.skip`, with the reason); a key nobody took is an error. Bound numbers that repeat
   something by `config.count`, so that a lying config cannot make a giant. Where there is no
   config.json, take sizes from the shapes.
2. `layouts(spec)`: lists of `Rule(ours, theirs, form)` (names.py), the one to be written first. In
   reading, the layout that fits the stored names best is taken. A `Form` must be exactly undone.
3. `config(spec) -> dict`: what config.json shall say (SpecError if nothing fits). It need not look
   at every field: `write` reads it back by `spec` and names the field that did not survive.
   `canonical` makes equal what means the same, such as a width of None and the width it stands for.
4. `Family(...)` of these, with `ignored` (names of stored tensors that are no weights), `tied` (the
   head and its twin), and, if there is no "model_type", the `signature`: names that only it has.
5. `register` it, and import the file in __init__.py. Test against the original: logits of prefill
   and cached decoding, tensors byte-equal after read and write, and the original reading ours.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kizzasi.errors import CheckpointError, SpecError
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.names import Link, Rule, apply
from kizzasi.models.checkpoints.native import CONFIG, compare
from kizzasi.models.checkpoints.storage import Shapes, Storage, open_file, open_folder, read_json
from kizzasi.models.model import Backend, SequenceModel, build_model
from kizzasi.models.spec import ModelSpec

Rules = Sequence[Rule]
SAFE = ".safetensors"


@dataclass(frozen=True)
class Family:
    """A foreign format.

    Args:
        name: as in `save(..., format=name)`, and config.json's "model_type" if it has one.
        spec, layouts, config: see the module. `config` is None for a format without config.json.
        signature: tensors that tell the format where config.json has no "model_type".
        ignored: stored tensors that are no weights; "#" stands for a number.
        tied: name of a head that may be stored too if the spec ties it, and the embedding's.
        canonical: specs of equal models become equal specs.
        file: what the tensors are written to, by torch.save unless it ends in .safetensors.
    """

    name: str
    spec: Callable[[Config, Shapes], ModelSpec]
    layouts: Callable[[ModelSpec], Sequence[Rules]]
    config: Callable[[ModelSpec], dict[str, Any]] | None
    signature: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    tied: tuple[str, str] | None = None
    canonical: Callable[[ModelSpec], ModelSpec] = lambda spec: spec
    file: str = f"model{SAFE}"


FAMILIES: dict[str, Family] = {}
# What a ModelSpec would need, of formats that people will try.
LACKING = {
    "zamba2": "it runs one Transformer block at several depths, on the embeddings beside the "
    "stream, and gives the result to one mixer only; a spec has layers of their own"
}


def register(family: Family) -> Family:
    """Make a family known to `load` and `save`."""
    assert family.name not in FAMILIES, f"{family.name} is registered twice"
    FAMILIES[family.name] = family
    return family


def read(
    path: Path,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    backend: Backend,
) -> SequenceModel:
    """See `kizzasi.models.load`. Names, shapes and dtypes are compared before anything is
    allocated, and the file is then read tensor by tensor."""
    family, spec, storage = recognise(path)
    return build(path, family, spec, storage, device=device, dtype=dtype, backend=backend)


def recognise(path: Path) -> tuple[Family, ModelSpec, Storage]:
    """Which format a folder or file is in, and the architecture it says. Reads no weights."""
    storage = open_folder(path) if path.is_dir() else open_file(path)
    data = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    shapes = {name: stored.shape for name, stored in storage.items()}
    family = _family(path, data, shapes)
    return family, read_spec(family, data, shapes, path), storage


def build(
    path: Path,
    family: Family,
    spec: ModelSpec,
    storage: Storage,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    backend: Backend,
) -> SequenceModel:
    """The model of a spec with the tensors of an open file; the rest is as in `read`."""
    try:
        meta = build_model(spec, device="meta")
    except SpecError as error:
        raise CheckpointError(f"{path}: {error}") from error
    links = _fit(path, family, spec, meta, storage)
    dtype = dtype or _stored_dtype(meta, links, storage)
    model = build_model(spec, dtype=dtype, backend=backend)
    _fill(model, links, storage)
    return model.to(device)


def write(model: SequenceModel, folder: str | os.PathLike[str], family: Family) -> None:
    """Write the folder that the family's own program reads.

    Every floating tensor has the embedding's dtype, or float32 where that would lose something (a
    bfloat16 model keeps some parameters in float32).

    Raises:
        CheckpointError: the format cannot express the model's spec, or the folder is unwritable.
    """
    folder = Path(folder)
    try:
        data = {} if family.config is None else family.config(model.spec)
        tensors = _tensors(model, family)
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        told, given = read_spec(family, data, shapes, CONFIG), family.canonical(model.spec)
    except (SpecError, CheckpointError) as error:
        raise CheckpointError(f"{folder}: cannot write it as {family.name}: {error}") from error
    if given != told:
        reason = _difference(given.to_dict(), told.to_dict())
        raise CheckpointError(f"{folder}: cannot write it as {family.name}: {reason}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors = _write_safetensors if family.file.endswith(SAFE) else torch.save
        _replace(folder / family.file, lambda path: write_tensors(tensors, path))
        if family.config is not None:
            text = json.dumps(data, indent=2, sort_keys=True) + "\n"
            _replace(folder / CONFIG, lambda path: path.write_text(text, "utf-8"))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: cannot write the checkpoint: {error}") from error


def _tensors(model: SequenceModel, family: Family) -> dict[str, Tensor]:
    """Under the names of the family's first layout."""
    usual = next(model.stem.parameters()).dtype
    state = {name: _lossless(t, usual) for name, t in model.state_dict().items()}
    links = apply(family.layouts(model.spec)[0], list(state))
    return {name: _alone(t) for name, t in _written(links, state).items()}


def _written(links: Sequence[Link], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors in their form."""
    theirs: dict[str, Tensor] = {}
    for link in links:
        tensors = link.form.write([ours[name] for name in link.ours])
        theirs |= zip(link.theirs, tensors, strict=True)
    return theirs


def _family(path: Path, data: Mapping[str, Any], shapes: Shapes) -> Family:
    kind = data.get("model_type")
    if kind is not None:
        if isinstance(kind, str) and kind in FAMILIES:
            return FAMILIES[kind]
        reason = LACKING.get(str(kind), f"only {', '.join(sorted(FAMILIES))}")
        raise CheckpointError(f"{path}: model_type {kind!r:.60} is not supported; {reason}")
    for family in FAMILIES.values():
        if family.signature and shapes.keys() >= set(family.signature):
            return family
    raise CheckpointError(
        f"{path}: unknown format: no model_type in a {CONFIG} there, and the names of the "
        f"{len(shapes)} tensors ({', '.join(sorted(shapes)[:3])}, ...) tell none; "
        f"if there is a {CONFIG}, give its folder"
    )


def read_spec(family: Family, data: Mapping[str, Any], shapes: Shapes, where: object) -> ModelSpec:
    """What a config in the words of the family says. Raises CheckpointError."""
    config = Config(data, str(where))
    try:
        spec = family.spec(config, shapes)
        config.finish()
        spec.check()
    except SpecError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return family.canonical(spec)


def _fit(
    path: Path, family: Family, spec: ModelSpec, meta: SequenceModel, storage: Storage
) -> list[Link]:
    """The links of the layout that fits best, after all that is wrong with it was raised."""
    ours = meta.state_dict()
    patterns = [re.escape(name).replace(r"\#", r"\d+") for name in family.ignored]
    ignored = re.compile("|".join(patterns) or "(?!)")
    given = {name: s.shape for name, s in storage.items() if not ignored.fullmatch(name)}
    if spec.tie_head and family.tied is not None and family.tied[0] in given:
        _check_twin(path, *family.tied, storage)
        del given[family.tied[0]]
    best: tuple[int, list[Link], dict[str, tuple]] | None = None
    for rules in family.layouts(spec):
        links = apply(rules, list(ours))
        wanted = {name: tuple(t.shape) for name, t in _written(links, ours).items()}
        faults = len(wanted.keys() ^ given.keys())
        if best is None or faults < best[0]:
            best = faults, links, wanted
    assert best is not None, f"{family.name} has no layout"
    compare(path, given, best[2])
    odd = [name for name in given if storage[name].dtype is None]
    if odd:
        raise CheckpointError(f"{path}: {odd[0]} is not of float64, 32, 16 or bfloat16; convert it")
    return best[1]


def _check_twin(path: Path, head: str, embedding: str, storage: Storage) -> None:
    twin = storage.get(embedding)
    same = twin is not None and twin.shape == storage[head].shape
    if not same or twin is None or not torch.equal(twin.read(), storage[head].read()):
        rule = f"{head} is stored and differs from {embedding}, but the config ties them"
        raise CheckpointError(f"{path}: {rule}; set tie_word_embeddings to false")


def _stored_dtype(meta: SequenceModel, links: Sequence[Link], storage: Storage) -> torch.dtype:
    """The widest dtype, but for float32 where a bfloat16 model has float32 anyway."""
    low = meta.to(torch.bfloat16).state_dict()
    found: list[torch.dtype] = []
    for link in links:
        kept = all(low[name].dtype == torch.float32 for name in link.ours)
        dtypes = [storage[name].dtype or torch.float32 for name in link.theirs]
        found += [dtype for dtype in dtypes if not kept or dtype == torch.float64]
    return functools.reduce(torch.promote_types, found)


def _fill(model: SequenceModel, links: Sequence[Link], storage: Storage) -> None:
    state = model.state_dict()
    for link in links:
        shapes = [state[name].shape for name in link.ours]
        values = link.form.read([storage[name].read() for name in link.theirs], shapes)
        for name, value in zip(link.ours, values, strict=True):
            assert value.shape == state[name].shape, f"{name}: the form does not undo itself"
            state[name].copy_(value)


def _lossless(tensor: Tensor, usual: torch.dtype) -> Tensor:
    """In the usual dtype if no value changes."""
    low = tensor.to(usual)
    return low if torch.equal(low.to(tensor.dtype), tensor) else tensor


def _alone(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and not a part of a larger tensor, which would be written whole."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _difference(ours: Any, theirs: Any, path: str = "") -> str:
    """The first field in which two plain specs differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        pairs = [(f"{path}.{key}".lstrip("."), ours[key], theirs[key]) for key in ours]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = [(f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    else:
        return f"{path} is {ours!r:.200}, and the format can only say {theirs!r:.200}"
    return next(_difference(a, b, at) for at, a, b in pairs if a != b)


def _write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def _replace(path: Path, make: Callable[[Path], Any]) -> None:
    """A crash leaves the old file or the new one, whole."""
    partial = path.with_name(path.name + ".partial")
    make(partial)
    os.replace(partial, path)
