"""Models as llama.cpp stores them: one GGUF file, often quantized.

A `Family` per `general.architecture` says what the metadata mean and how tensors are named there
(llama.py, ssm.py, rwkv.py); it is used both ways. Llama 3's stretched positions are
no metadata: they are stored as a tensor of the numbers that divide each frequency.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kizzasi.errors import CheckpointError
from kizzasi.models.attention.rope_scaling import RopeScaling
from kizzasi.models.checkpoints import foreign
from kizzasi.models.checkpoints.foreign import Family
from kizzasi.models.checkpoints.gguf.blocks import dequantize
from kizzasi.models.checkpoints.gguf.container import MAGIC, GGUFTensor, open_gguf
from kizzasi.models.checkpoints.gguf.llama import LIKE_LLAMA
from kizzasi.models.checkpoints.gguf.rwkv import RWKV, doubled, padded
from kizzasi.models.checkpoints.gguf.ssm import STATE_SPACES
from kizzasi.models.checkpoints.gguf.writer import Kind, write_gguf
from kizzasi.models.checkpoints.names import Link, apply
from kizzasi.models.checkpoints.quantized import GROUP, LevelTensor, quantize
from kizzasi.models.checkpoints.storage.stored import Storage, Stored
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.model import SequenceModel
from kizzasi.models.norm import KeepFloat32
from kizzasi.models.ops.engines import Engine
from kizzasi.models.spec import ModelSpec

NAME, SUFFIX = "gguf", ".gguf"
ARCHITECTURES: dict[str, Family] = {**LIKE_LLAMA, **STATE_SPACES, **RWKV}
DIVISORS = "rope_freqs.weight"
MANY = 2**16
PLAIN = {"F16": torch.float16, "BF16": torch.bfloat16}
# What is tried for the mixer of a model's first layer, the plainest last.
CANDIDATES = {"attention": ("qwen3", "qwen2", "llama"), "rwkv7": ("rwkv7",)}
CANDIDATES |= {"mamba": ("mamba",), "mamba2": ("mamba2",)}


class Found(NamedTuple):
    """What is in a file: how it is named, what it makes, its tensors, its metadata."""

    family: Family
    spec: ModelSpec
    storage: Storage
    tensors: Mapping[str, GGUFTensor]


def is_gguf(path: Path) -> bool:
    """Whether a file starts like one. Raises OSError."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def recognise(path: Path) -> Found:
    """The architecture of a file, and the spec that it says. Reads no weights."""
    file = open_gguf(path)
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{path}: architecture {name!r:.60} is not supported; only {known}")
    family, tensors, prefix = ARCHITECTURES[name], dict(file.tensors), f"{name}."
    divisors = tensors.pop(DIVISORS, None) if name in LIKE_LLAMA else None
    own = {
        key.removeprefix(prefix): _plain(value)
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    spec = foreign.read_spec(family, own, shapes, path, prefix)
    if divisors is not None:
        spec = _stretched(spec, _values(divisors).flatten().tolist())
    factor = {key: doubled(key, file.metadata) if name == "rwkv6" else 1.0 for key in tensors}
    storage = {
        key: Stored(t.shape, PLAIN.get(t.kind.name, torch.float32), _reader(t, factor[key]))
        for key, t in tensors.items()
    }
    return Found(family, spec, storage, tensors)


def read(
    path: Path,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    engine: Engine,
    quantized: bool = False,
) -> SequenceModel:
    """See `kizzasi.models.load`."""
    family, spec, storage, tensors = recognise(path)
    model = foreign.build(path, family, spec, storage, device=device, dtype=dtype, engine=engine)
    if quantized:
        found: dict[str, LevelTensor] = {}
        for name, link in _matrices(model, family).items():
            levels = _levels(tensors[link.theirs[0]], link) if link.theirs[0] in tensors else None
            if levels is not None:
                found[name] = levels
        quantize(model, found)
    return model


def write(
    model: SequenceModel,
    path: str | os.PathLike[str],
    kind: Kind,
    *,
    more: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a file that llama.cpp reads, and read it back before it gets its name.

    Args:
        path: ends in .gguf.
        kind: of matrices. Q8_0 shares a scale among 32 inputs; a matrix whose rows are no multiple
            of that becomes F16. What is no matrix is written in float32.
        more: further metadata, such as the tokenizer's.
        overwrite: replace a file.

    Raises:
        CheckpointError: no architecture of `CANDIDATES` expresses the model, or as in `save`.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        rule = f"a GGUF model is one file; give a name that ends in {SUFFIX}"
        raise CheckpointError(f"{path}: {rule}")
    if path.exists() and not overwrite:
        rule = "give another name, or overwrite=True (convert: --overwrite)"
        raise CheckpointError(f"{path}: is there already; {rule}")
    spec, divisors = _unstretched(model.spec)
    family, data, tensors = _expressed(model, spec, path)
    matrices = {link.theirs[0] for link in _matrices(model, family).values()}
    if family.name in RWKV:
        tensors = padded(tensors)
    if divisors is not None:
        tensors = {**tensors, DIVISORS: divisors}
    metadata: dict[str, Any] = {"general.architecture": family.name}
    metadata |= {f"{family.name}.{key}": value for key, value in data.items()}
    context = f"{family.name}.context_length"
    extra = {context if key == "context_length" else key: v for key, v in (more or {}).items()}
    metadata |= {context: 2048 if family.name in LIKE_LLAMA else 2**20, **extra}
    write_gguf(path, metadata, tensors, kind, matrices)


def _expressed(
    model: SequenceModel, spec: ModelSpec, path: Path
) -> tuple[Family, dict[str, Any], dict[str, Tensor]]:
    """The first architecture that can express a model, and what is written then."""
    mixer, refusals = spec.plain_blocks[0].mixer.kind, list[str]()
    if mixer not in CANDIDATES:
        rule = f"blocks[0].mixer is {mixer}, and the format knows {', '.join(CANDIDATES)}"
        raise CheckpointError(f"{path}: cannot write it as gguf: {rule}")
    for name in CANDIDATES[mixer]:
        family = ARCHITECTURES[name]
        try:
            data, tensors, _ = foreign.expressed(model, family, path, spec)
        except CheckpointError as error:
            refusals.append(str(error).removeprefix(f"{path}: "))
            continue
        return family, data, tensors
    raise CheckpointError(f"{path}: {'; '.join(refusals)}")


def _matrices(model: SequenceModel, family: Family) -> dict[str, Link]:
    """Where weights of linear layers and embeddings are stored, by their names here."""
    links = apply(family.layouts(model.spec)[0], list(model.state_dict()))
    alone = {link.ours[0]: link for link in links if len(link.ours) == len(link.theirs) == 1}
    plain = (nn.Linear, nn.Embedding)
    modules = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, plain)}
    found = [name for name, m in modules.items() if not isinstance(m, KeepFloat32)]
    return {name: alone[name] for name in found if name in alone}


def _plain(value: Any) -> Any:
    """A short array of numbers, such as one for each layer, as a list."""
    return value.tolist() if isinstance(value, np.ndarray) and len(value) < MANY else value


def _values(tensor: GGUFTensor) -> Tensor:
    """Its values; quantized ones in float32."""
    values = torch.from_numpy(dequantize(tensor.kind, tensor.data)).view(tensor.shape)
    return values.to(PLAIN.get(tensor.kind.name, torch.float32))


def _reader(tensor: GGUFTensor, factor: float) -> Any:
    return lambda: _values(tensor) if factor == 1 else _values(tensor) * factor


def _levels(tensor: GGUFTensor, link: Link) -> LevelTensor | None:
    """Integers of a stored matrix with its rows in our order, if scales are shared by 32 inputs."""
    unpack = tensor.kind.unpack
    with np.errstate(all="ignore"):
        found = None if unpack is None else unpack(tensor.data.view(tensor.kind.layout))
    if found is None or found.level.shape[-1] != GROUP or len(tensor.shape) != 2:
        return None

    def rows(groups: NDArray) -> Tensor:
        """(blocks, groups, size) to (n, groups of a row, size), copied: the file is read-only."""
        flat = torch.from_numpy(np.array(groups)).view(tensor.shape[0], -1, groups.shape[-1])
        return link.form.read([flat], [flat.shape])[0].contiguous()

    minimum = None if found.minimum is None else rows(found.minimum)
    return LevelTensor(rows(found.level), rows(found.scale), minimum)


def _stretched(spec: ModelSpec, divisors: list[float]) -> ModelSpec:
    """Every frequency divided by its own number; queries and keys keep their size."""
    scaling = RopeScaling("longrope", 1.0, 2, attention_factor=1.0, divisors=tuple(divisors))
    return _with_scaling(spec, scaling)


def _unstretched(spec: ModelSpec) -> tuple[ModelSpec, Tensor | None]:
    """A spec without what its layers' frequencies are divided by, and these numbers, where they
    are alike in all layers and metadata cannot say them."""
    mixers = [block.mixer for block in spec.plain_blocks]
    found = {m.rope_scaling for m in mixers if isinstance(m, AttentionSpec)}
    if len(found) != 1 or not isinstance(mixers[0], AttentionSpec):
        return spec, None
    scaling, mixer = found.pop(), mixers[0]
    if scaling is None or scaling.method in ("linear", "yarn") or scaling.scale != 1:
        return spec, None
    n, like = mixer.width(spec.d_model), {"device": torch.device("cpu"), "dtype": torch.float64}
    plain = RopeScaling("linear", 1.0).frequencies(n, mixer.rope_theta, **like)
    divisors = plain / scaling.frequencies(n, mixer.rope_theta, **like)
    return _with_scaling(spec, None), divisors.float()


def _with_scaling(spec: ModelSpec, scaling: RopeScaling | None) -> ModelSpec:
    blocks = []
    for block in spec.plain_blocks:
        assert isinstance(block.mixer, AttentionSpec), "of the Llama family"
        blocks.append(replace(block, mixer=replace(block.mixer, rope_scaling=scaling)))
    return spec.replace(blocks=tuple(blocks))
