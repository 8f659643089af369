"""From a spec to a model: which engines it runs on, whether it fits, how it starts."""

from __future__ import annotations

import os
from typing import get_args

import torch
from torch import nn

from kizzasi.errors import SpecError
from kizzasi.models.init import materialize
from kizzasi.models.mixer import Mixer
from kizzasi.models.model import SequenceModel
from kizzasi.models.norm import Norm
from kizzasi.models.ops.devices import usable_device
from kizzasi.models.ops.engines import Engine
from kizzasi.models.parts.linear import Linear
from kizzasi.models.spec import ModelSpec
from kizzasi.models.stems import TokenStem


def build_model(
    spec: ModelSpec,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    engine: Engine = "auto",
) -> SequenceModel:
    """Build a model with freshly initialised weights.

    Args:
        spec: the architecture; `spec.check()` is applied first.
        seed: of the initialisation. Weights are drawn on the CPU, so every device gets the same.
        device: where the model goes; None means the CPU. "meta" allocates nothing.
        dtype: float32 (None), float64, bfloat16 or float16. Decays, norms and routers stay at
            least float32.
        engine: of every op: "torch" (portable and fast), "reference" (the defining loops),
            "native" (CPU), "triton" (CUDA), or "auto", what is fastest where the model stands; see
            `kizzasi.models.ops.engines`. Layers without such ops have one way to run.

    Raises:
        SpecError: a rule is broken, the engine or device is missing, or the model would not fit in
            memory.
    """
    target = usable_device(device)
    model = skeleton(spec, target, engine)
    refuse_if_too_large(spec, target, dtype or torch.float32)
    if target.type != "meta":
        materialize(model, lambda: model.reset_parameters(seed))
    return model.to(device=target, dtype=dtype or torch.float32)


def skeleton(spec: ModelSpec, target: torch.device, engine: Engine = "auto") -> SequenceModel:
    """The modules without their numbers: on "meta", with the engines of the target.

    Raises SpecError as `build_model` does.
    """
    spec.check()
    refuse_if_too_large(spec, torch.device("meta"), torch.float32)
    with torch.device("meta"):
        model = SequenceModel(spec)
    for name, part in model.named_modules():
        if isinstance(part, Mixer):
            part.engine = _admit(engine, part, name, target)
        elif isinstance(part, (Norm, TokenStem)):
            part.engine = "torch" if engine in ("torch", "reference") else "auto"
        elif type(part) is nn.Linear and engine in ("auto", "native"):
            part.__class__ = Linear  # the same layer, whose product has engines
    return model


def _admit(engine: Engine, mixer: Mixer, name: str, device: torch.device) -> Engine:
    """The engine, if every op of the mixer has it there."""
    known = get_args(Engine)
    if engine not in known:
        raise SpecError(f"engine: {engine!r} is unknown; choose one of {list(known)}")
    try:
        for op in mixer.ops:
            op.resolve(engine, device)
    except SpecError as error:
        raise SpecError(f"{name}: {error}") from error
    return engine


def memory_bytes(device: torch.device) -> int:
    """All memory of a device, in bytes; for "meta" the size that no tensor can exceed."""
    if device.type == "meta":
        return 2**62
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def refuse_if_too_large(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
    """Raise SpecError if the parameters alone need more than all memory of a device."""
    params = spec.cost(1).params
    need, have = params * dtype.itemsize, memory_bytes(device)
    if need > have:
        raise SpecError(
            f"{params:.3g} parameters need {need / 2**30:.3g} GiB and {device} has "
            f"{have / 2**30:.3g} GiB; make d_model or the number of blocks smaller"
        )
