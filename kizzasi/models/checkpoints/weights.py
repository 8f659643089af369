"""Between a model and named tensors: filling one from a file, and taking one out to be written.

Filling draws nothing at random. The modules are made without numbers, with the engines of the
device they are meant for, and each tensor goes from the file to its device and dtype and becomes
the parameter; so the host holds the model once at most, and one tensor more.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kizzasi.errors import CheckpointError, SpecError
from kizzasi.models.build import refuse_if_too_large, skeleton
from kizzasi.models.checkpoints.names import Link
from kizzasi.models.checkpoints.storage.files import INNER, WRAPPERS
from kizzasi.models.checkpoints.storage.stored import Shape, Storage
from kizzasi.models.model import SequenceModel
from kizzasi.models.ops.devices import usable_device
from kizzasi.models.ops.engines import Engine
from kizzasi.models.spec import ModelSpec

# What is found among the names of a changed model, and the remedy.
CHANGED = {
    r"\.(\w+)_(orig|mask)$": "pruned; make it part of the weights by torch.nn.utils.prune.remove",
    r"\.parametrizations\.": "parametrized; make the weights plain by "
    "torch.nn.utils.parametrize.remove_parametrizations",
    r"\.weight_[gv]$": "under weight_norm; call torch.nn.utils.remove_weight_norm first",
    r"\.(lora_\w+|base_layer|modules_to_save)\.": "has adapters inside; merge them "
    "(peft: merge_and_unload), or save them alone by peft's save_pretrained",
}


def empty(
    spec: ModelSpec, path: object, device: torch.device | str | None, engine: Engine
) -> SequenceModel:
    """The modules without numbers, on "meta". Raises CheckpointError about the file."""
    target = usable_device(device)
    try:
        return skeleton(spec, target, engine)
    except SpecError as error:
        raise CheckpointError(f"{path}: cannot fit its config: {error}") from error


def fill(
    model: SequenceModel,
    links: Sequence[Link],
    storage: Storage,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> SequenceModel:
    """Give an empty model its tensors.

    Args:
        model: from `empty`.
        links: which of the stored tensors are which of ours.
        device, dtype: as for `load`.

    Raises SpecError if it does not fit on the device.
    """
    dtype = dtype or stored_dtype(model, links, storage)
    refuse_if_too_large(model.spec, usable_device(device), dtype)
    model = model.to(dtype)
    like, state = model.state_dict(), dict[str, Tensor]()
    for link in links:
        shapes = [like[name].shape for name in link.ours]
        values = link.form.read([storage[name].read() for name in link.theirs], shapes)
        for name, value in zip(link.ours, values, strict=True):
            assert value.shape == like[name].shape, f"{name}: the form does not undo itself"
            state[name] = _owned(value.to(device=device or "cpu", dtype=like[name].dtype))
    model.load_state_dict(state, strict=True, assign=True)
    return model


def stored_dtype(model: SequenceModel, links: Sequence[Link], storage: Storage) -> torch.dtype:
    """The widest dtype, but for float32 where a bfloat16 model has float32 anyway."""
    low = {name: t.dtype for name, t in model.to(torch.bfloat16).state_dict().items()}
    model.to(torch.float32)
    found: list[torch.dtype] = []
    for link in links:
        kept = all(low[name] != torch.bfloat16 for name in link.ours)
        dtypes = [storage[name].dtype or torch.float32 for name in link.theirs]
        found += [d for d in dtypes if d.is_floating_point and (not kept or d == torch.float64)]
    return functools.reduce(torch.promote_types, found)


def _owned(value: Tensor) -> Tensor:
    """Contiguous, and not a part of a larger tensor, which would be kept whole."""
    value = value.contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def compare(path: object, given: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> None:
    """Raise CheckpointError naming missing, unexpected and misshapen tensors."""
    faults = [f"missing {n}" for n in sorted(wanted.keys() - given.keys())]
    faults += [f"unexpected {n}" for n in sorted(given.keys() - wanted.keys())]
    both = sorted(given.keys() & wanted.keys())
    faults += [f"{n} is {given[n]}, not {wanted[n]}" for n in both if given[n] != wanted[n]]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(f"{path}: does not fit its config: {'; '.join(faults[:5])}{more}")


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(t.shape) for name, t in tensors.items()}


def taken(model: SequenceModel, where: object) -> dict[str, Tensor]:
    """The model's tensors by name, after a look at whether `load` could give them back.

    Wrappers of torch.compile and the like are seen through.

    Raises:
        CheckpointError: the modules are no longer those of the spec (pruned, parametrized, with
            adapters inside, layers cut or exchanged, weights shared that the spec does not share),
            or a tensor has no values here (meta, sharded).
    """
    given: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        given[INNER.sub("", WRAPPERS.sub("", name))] = tensor
    wanted = skeleton(model.spec, torch.device("meta")).state_dict(keep_vars=True)
    for pattern, remedy in CHANGED.items():
        found = next((n for n in given.keys() - wanted.keys() if re.search(pattern, n)), None)
        if found is not None:
            raise CheckpointError(f"{where}: cannot save: {found}: {remedy}")
    try:
        compare("the model", shapes_of(given), shapes_of(wanted))
    except CheckpointError as error:
        rule = "change the spec instead of the modules, build_model it, and load_state_dict there"
        raise CheckpointError(f"{where}: cannot save: {error}; {rule}") from error
    odd = [n for n, t in given.items() if t.is_meta or type(t).__module__.split(".")[0] != "torch"]
    odd += [n for n, t in given.items() if type(t) not in (Tensor, torch.nn.Parameter)]
    if odd:
        kind = "meta tensor" if given[odd[0]].is_meta else type(given[odd[0]]).__name__
        rule = "gather or load the values first, for example by get_model_state_dict"
        raise CheckpointError(f"{where}: cannot save: {odd[0]} is a {kind}; {rule}")
    _refuse_sharing(given, wanted, where)
    return {name: tensor.detach() for name, tensor in given.items()}


def _refuse_sharing(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: object
) -> None:
    """A loaded model would have two weights where this one has one."""
    ours, theirs = _twins(given.items()), _twins(wanted.items())
    for name in sorted(ours):
        if ours[name] != theirs[name]:
            other = ours[name] if ours[name] != name else theirs[name]
            rule = "say so in the spec (tie_head, a shared layer), or give each a copy of its own"
            raise CheckpointError(
                f"{where}: cannot save: {name} and {other} are one tensor in the model or in its "
                f"spec, but not in both; {rule}"
            )


def _twins(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Every name, and the first name of the same tensor."""
    first: dict[object, str] = {}
    return {
        name: first.setdefault(id(t) if t.is_meta else (t.device, t.data_ptr(), t.shape), name)
        for name, t in tensors
    }


def alone(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and not a part of a larger tensor, which would be written whole."""
    return _owned(tensor.detach().cpu())


def folder_with_no_model(folder: Path, names: Iterable[str], overwrite: bool) -> None:
    """Raise CheckpointError if a model is there that nobody asked to replace."""
    there = [name for name in names if (folder / name).exists() or (folder / name).is_symlink()]
    if there and not overwrite:
        rule = "give another folder, or overwrite=True (convert: --overwrite)"
        raise CheckpointError(f"{folder}: holds a model already ({there[0]}); {rule}")
