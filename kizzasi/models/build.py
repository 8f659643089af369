"""From a spec to a model: which engines it runs on, whether it fits, how it starts."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

import torch

from kizzasi.errors import SpecError
from kizzasi.models.device import usable_device
from kizzasi.models.init import materialize
from kizzasi.models.mixer import Mixer
from kizzasi.models.model import SequenceModel
from kizzasi.models.spec import ModelSpec

Backend = Literal["auto", "torch", "reference", "triton"]


def build_model(
    spec: ModelSpec,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> SequenceModel:
    """Build a model with freshly initialised weights.

    Args:
        spec: the architecture; `spec.check()` is applied first.
        seed: of the initialisation. Weights are drawn on the CPU, so every device gets the same.
        device: where the model goes; None means the CPU. "meta" allocates nothing.
        dtype: float32 (None), float64, bfloat16 or float16. Decays, norms and routers stay at
            least float32.
        backend: "torch" (portable and fast), "reference" (the defining loops), "triton", or "auto":
            triton on CUDA where Triton is installed and the mixer has such kernels, else torch.

    Raises:
        SpecError: a rule is broken, the backend or device is missing, or the model would not fit in
            memory.
    """
    target = usable_device(device)
    model = skeleton(spec, target, backend)
    refuse_if_too_large(spec, target, dtype or torch.float32)
    if target.type != "meta":
        materialize(model, lambda: model.reset_parameters(seed))
    return model.to(device=target, dtype=dtype or torch.float32)


def skeleton(spec: ModelSpec, target: torch.device, backend: Backend = "auto") -> SequenceModel:
    """The modules without their numbers: on "meta", with the engines of the target.

    Raises SpecError as `build_model` does.
    """
    spec.check()
    refuse_if_too_large(spec, torch.device("meta"), torch.float32)
    with torch.device("meta"):
        model = SequenceModel(spec)
    for name, mixer in model.named_modules():
        if isinstance(mixer, Mixer):
            mixer.backend = choose_backend(backend, target, type(mixer), name)
    return model


def choose_backend(
    wanted: Backend, device: torch.device, mixer: type[Mixer], name: str = ""
) -> str:
    """The rule behind backend="auto"; a named backend is taken or refused, never swapped."""
    has_triton = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if wanted == "auto":
        return "triton" if has_triton and "triton" in mixer.backends else "torch"
    if wanted not in mixer.backends:
        raise SpecError(f"backend: {name} has no {wanted!r}; choose from {list(mixer.backends)}")
    if wanted == "triton" and not has_triton:
        raise SpecError('backend: "triton" needs a CUDA device and the package triton; use "auto"')
    return wanted


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
