"""What a parallel pass of a model costs on this device: milliseconds, and the most memory."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kizzasi.models import ModelSpec, SequenceModel, Signal, build_model


def latency_ms(model: SequenceModel, inputs: Tensor, repeats: int) -> float:
    """Median wall-clock milliseconds of a parallel pass, after two that do not count."""
    times = []
    with torch.inference_mode():
        for _ in range(2 + repeats):
            _wait(inputs.device)
            start = time.perf_counter()
            model(inputs)
            _wait(inputs.device)
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def peak_memory_bytes(model: SequenceModel, inputs: Tensor) -> int:
    """The most bytes that weights, inputs and activations take at once in a parallel pass.

    On CUDA, what the allocator handed out beyond what other models hold; elsewhere, the storages
    that live between two operations, without the scratch memory inside one.
    """
    held = _bytes([*model.parameters(), *model.buffers(), inputs])
    with torch.inference_mode():
        if inputs.is_cuda:
            model(inputs)  # so that libraries' workspaces are there before
            torch.cuda.reset_peak_memory_stats(inputs.device)
            before = torch.cuda.memory_allocated(inputs.device)
            model(inputs)
            return held + torch.cuda.max_memory_allocated(inputs.device) - before
        with _LiveBytes() as live:
            model(inputs)
    return held + live.peak


class _LiveBytes(TorchDispatchMode):
    """Follows the bytes of storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {s.data_ptr() for s in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage not in self.known and storage.data_ptr() not in given:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, n: int) -> None:
        self.now -= n


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum({s.data_ptr(): s.nbytes() for s in _storages(list(tensors))}.values())


def built(spec: ModelSpec, seq_len: int, device: torch.device) -> tuple[SequenceModel, Tensor]:
    model = build_model(spec, device=device).eval()
    if isinstance(spec.stem, Signal):
        return model, torch.zeros(1, seq_len, spec.stem.n_in, device=device)
    return model, torch.zeros(1, seq_len, dtype=torch.int64, device=device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
