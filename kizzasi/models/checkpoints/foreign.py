"""Checkpoints of other programs: one small declarative `Family` per format.

To add a family, write a file in families/:

1. `spec(config, shapes) -> ModelSpec`: take every key by `config.get/count/choose/only/within` (or
   `config.skip`, with the reason); a key nobody took is an error. Bound numbers that repeat
   something by `config.count`, so that a lying config cannot make a giant. Where there is no
   config.json, take sizes from the shapes.
2. `layouts(spec)`: lists of `Rule(ours, theirs, form)` (names.py), the one to be written first. In
   reading, the layout that fits the stored names, then shapes, best is taken. A `Form` must be
   exactly undone.
3. `config(spec) -> dict`: what config.json shall say (SpecError if nothing fits). It need not look
   at every field: `write` reads it back by `spec` and names the field that did not survive.
   `canonical` makes equal what means the same, such as a width of None and the width it stands for.
4. `Family(...)` of these, with `ignored` (names of stored tensors that are no weights), `tied` (the
   head and its twin), and, if there is no "model_type", the `signature`: names that only it has.
5. `register` it, and import the file in families/all.py. Test against the original: logits of
   prefill and cached decoding, tensors byte-equal after read and write, and the original reading
   ours.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kizzasi.errors import CheckpointError, SpecError
from kizzasi.files import Make, write_files
from kizzasi.models.checkpoints.config import Config
from kizzasi.models.checkpoints.names import Link, Rule, apply, written
from kizzasi.models.checkpoints.native import CONFIG, SHARD_BYTES, plain_files, to_json
from kizzasi.models.checkpoints.native import write as write_folder
from kizzasi.models.checkpoints.storage.files import (
    WHOLE,
    earlier_weights,
    open_file,
    open_folder,
    read_json,
    require_equal,
)
from kizzasi.models.checkpoints.storage.stored import FLOATS, Shapes, Storage
from kizzasi.models.checkpoints.weights import (
    alone,
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
        tied: name of a head that may be stored too if the spec ties it, and the embedding's, whose
            first part is missing in files of a model without its head, and put back in all names.
        canonical: specs of equal models become equal specs.
        surplus: how names of layers start, with "#" for the number, if those behind the last one
            are no part of the model (DeepSeek's, that predict further tokens).
        folded: what the config multiplies outputs with, multiplied into the stored tensors (Falcon
            H1's; what is written has none). The config has been read without complaint.
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
    surplus: str | None = None
    folded: Callable[[Mapping[str, Any], ModelSpec, Storage], Storage] = lambda data, spec, s: s
    file: str = f"model{SAFE}"


class Families(Mapping[str, Family]):
    """The families by name, which families/all.py imports when one is first asked for: that takes
    as long as all mixers do."""

    def __init__(self) -> None:
        self.known: dict[str, Family] = {}

    def __getitem__(self, name: str) -> Family:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> dict[str, Family]:
        importlib.import_module("kizzasi.models.checkpoints.families.all")
        return self.known


FAMILIES = Families()


def register(family: Family) -> Family:
    """Make a family known to `load` and `save`."""
    assert family.name not in FAMILIES.known, f"{family.name} is registered twice"
    FAMILIES.known[family.name] = family
    return family


def read(
    path: Path,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    engine: Engine,
) -> SequenceModel:
    """See `kizzasi.models.load`. Names, shapes and dtypes are compared before anything is
    allocated, and the file is then read tensor by tensor."""
    family, spec, storage = recognise(path)
    return build(path, family, spec, storage, device=device, dtype=dtype, engine=engine)


def recognise(path: Path) -> tuple[Family, ModelSpec, Storage]:
    """Which format a folder or file is in, and the architecture it says. Reads no weights."""
    storage = open_folder(path) if path.is_dir() else open_file(path)
    data = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    shapes = {name: stored.shape for name, stored in storage.items()}
    family = _family(path, data, shapes)
    storage = _whole_names(family, storage)
    shapes = {name: stored.shape for name, stored in storage.items()}
    spec = read_spec(family, data, shapes, path)
    return family, spec, family.folded(data, spec, storage)


def build(
    path: Path,
    family: Family,
    spec: ModelSpec,
    storage: Storage,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    engine: Engine,
) -> SequenceModel:
    """The model of a spec with the tensors of an open file; the rest is as in `read`."""
    model = empty(spec, path, device, engine)
    return fill(model, _fit(path, family, spec, model, storage), storage, device, dtype)


def write(
    model: SequenceModel,
    folder: str | os.PathLike[str],
    family: Family,
    *,
    max_shard_size: int | str = SHARD_BYTES,
    overwrite: bool = False,
    ids: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write the folder that the family's own program reads, and read it back.

    Every floating tensor has the embedding's dtype, or float32 where that would lose something (a
    bfloat16 model keeps some parameters in float32). Special ids and the longest document go into
    config.json where the format has a place for them. The rest is as in `native.save`.

    Raises:
        CheckpointError: the format cannot express the model's spec, a model is there already, this
            one could not be loaded again, or the folder is unwritable.
    """
    folder = Path(folder)
    data, tensors, given = expressed(model, family, folder)
    there = [CONFIG, family.file, *(p.name for p in earlier_weights(folder))]
    folder_with_no_model(folder, there, overwrite)
    config = None if family.config is None else _with_ids(family, data, ids or {}, given, tensors)
    more = {} if files is None else dict(files)
    if config is not None and family.file == WHOLE[0]:
        write_folder(folder, tensors, config, max_shard_size, more)
        return
    if config is not None:
        more[CONFIG] = to_json(config)
    makers: dict[Path, Make] = {folder / family.file: lambda file: torch.save(tensors, file)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stale = [path for path in earlier_weights(folder) if path.name != family.file]
        check: Any = lambda paths: require_equal(paths[0], tensors)  # noqa: E731
        write_files(makers | plain_files(folder, more), check, stale)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: cannot write the checkpoint: {error}") from error


def expressed(
    model: SequenceModel, family: Family, where: object, spec: ModelSpec | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], ModelSpec]:
    """What the config says of a model, its tensors by their names there, and its canonical spec.

    spec: the model's, or as much of it as the config has to say.

    Raises:
        CheckpointError: the format cannot express it; the message names the field.
    """
    spec = model.spec if spec is None else spec
    try:
        data = {} if family.config is None else family.config(spec)
        tensors = _tensors(model, family, where)
        told = read_spec(family, data, shapes_of(tensors), CONFIG)
        given = family.canonical(spec)
    except (SpecError, CheckpointError) as error:
        raise CheckpointError(f"{where}: cannot write it as {family.name}: {error}") from error
    if given != told:
        reason = _difference(given.to_dict(), told.to_dict())
        raise CheckpointError(f"{where}: cannot write it as {family.name}: {reason}")
    return data, tensors, given


def _with_ids(
    family: Family,
    data: Mapping[str, Any],
    ids: Mapping[str, Any],
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
) -> dict[str, Any]:
    """The config with special ids and the longest document, each where the format has a place for
    it and the architecture stays the same."""
    config, shapes = dict(data), shapes_of(tensors)
    for key, value in ids.items() if "model_type" in data else ():
        try:
            same = read_spec(family, config | {key: value}, shapes, CONFIG) == spec
        except CheckpointError:
            same = False
        config |= {key: value} if same else {}
    return dict(sorted(config.items()))


def _tensors(model: SequenceModel, family: Family, folder: object) -> dict[str, Tensor]:
    """Under the names of the family's first layout."""
    usual = next(model.stem.parameters()).dtype
    state = {name: _lossless(t, usual) for name, t in taken(model, folder).items()}
    links = apply(family.layouts(model.spec)[0], list(state))
    return {name: alone(t) for name, t in written(links, state).items()}


def _family(path: Path, data: Mapping[str, Any], shapes: Shapes) -> Family:
    kind = data.get("model_type")
    if kind is not None:
        if isinstance(kind, str) and kind in FAMILIES:
            return FAMILIES[kind]
        known = ", ".join(sorted(FAMILIES))
        raise CheckpointError(f"{path}: model_type {kind!r:.60} is not supported; only {known}")
    for family in FAMILIES.values():
        if family.signature and shapes.keys() >= set(family.signature):
            return family
    raise CheckpointError(
        f"{path}: unknown format: no model_type in a {CONFIG} there, and the names of the "
        f"{len(shapes)} tensors ({', '.join(sorted(shapes)[:3])}, ...) tell none; "
        f"if there is a {CONFIG}, give its folder"
    )


def _whole_names(family: Family, storage: Storage) -> Storage:
    """The names of a model with its head, of a file that holds one without."""
    if family.tied is None:
        return storage
    base, _, embedding = family.tied[1].partition(".")
    if embedding not in storage or any(name.startswith(f"{base}.") for name in storage):
        return storage
    head = family.tied[0].rpartition(".")[0]
    return {
        name if name.startswith(f"{head}.") else f"{base}.{name}": stored
        for name, stored in storage.items()
    }


def read_spec(
    family: Family, data: Mapping[str, Any], shapes: Shapes, where: object, prefix: str = ""
) -> ModelSpec:
    """What a config in the words of the family says; `prefix` is of its keys in messages.

    Raises CheckpointError."""
    config = Config(data, str(where), prefix)
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
    if spec.tie_head and family.tied is not None and family.tied[0] in storage:
        _check_twin(path, *family.tied, storage)
    return _matched(path, family, spec, meta, storage)


def require_tensors(path: Path, family: Family, spec: ModelSpec, storage: Storage) -> None:
    """Raise CheckpointError unless the names, shapes and dtypes are those of the spec's model."""
    _matched(path, family, spec, empty(spec, path, None, "auto"), storage)


def _matched(
    path: Path, family: Family, spec: ModelSpec, meta: SequenceModel, storage: Storage
) -> list[Link]:
    """As `_fit`; no value is looked at."""
    ours = meta.state_dict()
    patterns = [re.escape(name).replace(r"\#", r"\d+") for name in family.ignored]
    ignored = re.compile("|".join(patterns) or "(?!)")
    given = {name: s.shape for name, s in storage.items() if not ignored.fullmatch(name)}
    if family.surplus is not None:
        layer = re.compile(re.escape(family.surplus).replace(r"\#", r"(\d+)"))
        beyond = [n for n in given if (m := layer.match(n)) and int(m[1]) >= len(spec.blocks)]
        given = {name: shape for name, shape in given.items() if name not in beyond}
    if spec.tie_head and family.tied is not None:
        given.pop(family.tied[0], None)
    best: tuple[tuple[int, int], list[Link], dict[str, tuple]] | None = None
    for rules in family.layouts(spec):
        links = apply(rules, list(ours))
        wanted = {name: tuple(t.shape) for name, t in written(links, ours).items()}
        odd = sum(given[name] != shape for name, shape in wanted.items() if name in given)
        faults = len(wanted.keys() ^ given.keys()), odd
        if best is None or faults < best[0]:
            best = faults, links, wanted
    assert best is not None, f"{family.name} has no layout"
    compare(path, given, best[2])
    others = [name for name in given if storage[name].dtype not in FLOATS]
    if others:
        raise CheckpointError(
            f"{path}: {others[0]} is not of float64, 32, 16 or bfloat16; convert it"
        )
    return best[1]


def _check_twin(path: Path, head: str, embedding: str, storage: Storage) -> None:
    twin = storage.get(embedding)
    same = twin is not None and twin.shape == storage[head].shape
    if not same or twin is None or not torch.equal(twin.read(), storage[head].read()):
        rule = f"{head} is stored and differs from {embedding}, but the config ties them"
        raise CheckpointError(f"{path}: {rule}; set tie_word_embeddings to false")


def _lossless(tensor: Tensor, usual: torch.dtype) -> Tensor:
    """In the usual dtype if no value changes."""
    low = tensor.to(usual)
    return low if torch.equal(low.to(tensor.dtype), tensor) else tensor


def _difference(ours: Any, theirs: Any, path: str = "") -> str:
    """The first field in which two plain specs differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        pairs = [(f"{path}.{key}".lstrip("."), ours[key], theirs[key]) for key in ours]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = [(f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    else:
        return f"{path} is {ours!r:.200}, and the format can only say {theirs!r:.200}"
    return next(_difference(a, b, at) for at, a, b in pairs if a != b)
