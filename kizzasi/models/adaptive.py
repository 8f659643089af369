"""Modules that change themselves once per optimiser step: routers that balance by a bias.

A forward in training only counts; what follows from the counts happens in `after_step`, once the
optimiser has made its step. So any number of accumulated batches makes one change, a graph of the
forward holds no decision, and processes meet here and not inside a forward.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kizzasi.models.ops.autodiff import transformed

PASSES_WITHOUT_A_STEP = 256


class Tally(nn.Module):
    """Sums over forwards, no parameter and no buffer: nobody saves it, and DDP does not overwrite
    it with another process's. It is zero after every move to another device or dtype.

    Args:
        n: how many numbers.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.sums, self.passes = torch.zeros(n, dtype=torch.float32), 0

    def add(self, amounts: Tensor) -> None:
        """Add (n,) to the sums, unless this forward is a recomputation (activation checkpointing),
        or inside a transform of torch.func or an exported program, which may not write."""
        if not counts_here():
            return
        self._come_to(amounts.device)
        self.sums.add_(amounts.detach())
        if not torch.compiler.is_compiling():
            self.passes += 1
            if self.passes == PASSES_WITHOUT_A_STEP:
                warnings.warn(
                    f"{self.passes} training passes and no model.after_step(), so the router's "
                    "balancing bias stands still; call it after optimizer.step()",
                    stacklevel=2,
                )

    def take(self, device: torch.device) -> Tensor:
        """The sums, on a device; they begin anew."""
        self._come_to(device)
        taken, self.passes = self.sums.clone(), 0
        self.sums.zero_()
        return taken

    def _come_to(self, device: torch.device) -> None:
        if self.sums.device != device:  # of a model that was built on the meta device
            self.sums = torch.zeros_like(self.sums, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Tally:
        like = fn(self.sums)
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.sums = torch.zeros_like(like, dtype=dtype)
        return self


class Adaptive(ABC):
    """A module with something to change after a step of the optimiser, from what it counted."""

    @abstractmethod
    def take(self) -> Tensor | None:
        """(n,) what was counted since the last call; None if there is nothing to change."""

    @abstractmethod
    def after_step(self, counted: Tensor) -> None:
        """Change; `counted` is what `take` gave, summed over all processes."""


@torch.no_grad()
def after_step(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Let every adaptive module in `model` change; call it after every `optimizer.step()`.

    Args:
        model: any module.
        group: the processes that trained on one batch together; what they counted is summed in one
            collective, which all of them must reach. None means all processes, if there are any.
    """
    both = [(module, module.take()) for module in model.modules() if isinstance(module, Adaptive)]
    modules = [module for module, counted in both if counted is not None]
    taken = [counted for _, counted in both if counted is not None]
    if taken and dist.is_available() and dist.is_initialized():
        total = torch.cat(taken)
        dist.all_reduce(total, group=group)
        taken = list(total.split([len(one) for one in taken]))
    for module, counted in zip(modules, taken, strict=True):
        module.after_step(counted)


def after_every_step(
    optimizer: torch.optim.Optimizer, model: nn.Module, group: dist.ProcessGroup | None = None
) -> RemovableHandle:
    """Have `after_step(model, group)` called by every `optimizer.step()`; returns what ends it."""

    def follow(*_: Any) -> None:
        after_step(model, group)

    return optimizer.register_step_post_hook(follow)


def counts_here() -> bool:
    """Whether a forward counts: not when it is a recomputation, or may not write."""
    if torch.compiler.is_compiling():  # a graph's recomputation does not repeat what it writes
        return not torch.compiler.is_exporting()
    return torch._C._current_graph_task_id() == -1 and not transformed()
