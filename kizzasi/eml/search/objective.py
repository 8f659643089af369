"""A loss as a function of flat parameters: any module's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from kizzasi.errors import SpecError

Loss = Callable[[Tensor], Tensor]


class ModuleObjective:
    """The loss of any module as a function of its flat parameters, many candidates at once.

    Candidates are run through one vectorised forward; buffers are shared, gradients are off.
    A criterion that returns a vector of residuals serves `GaussNewton`.

    Args:
        module: not changed, except by `assign`.
        criterion: loss, or residuals (m), from the module's output; close it over the targets.
        inputs: positional arguments of the module.
        names: parameters to search over, in this order; None means all of them.
        batch_size: candidates per vectorised forward: memory against speed, never the result.
    """

    def __init__(
        self,
        module: nn.Module,
        criterion: Callable[[Any], Tensor],
        *inputs: Any,
        names: list[str] | None = None,
        batch_size: int = 64,
    ) -> None:
        named = dict(module.named_parameters())
        unknown = set(names or ()) - set(named)
        if unknown:
            raise SpecError(f"names {sorted(unknown)} are not parameters; choose from {[*named]}")
        self.module, self.criterion, self.inputs = module, criterion, inputs
        self.parameters = {name: named[name] for name in (names or named)}
        self.batch_size = batch_size

    @property
    def start(self) -> Tensor:
        """The module's present parameters, (1, n)."""
        return torch.cat([p.detach().flatten() for p in self.parameters.values()])[None]

    def _unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([p.numel() for p in self.parameters.values()])
        shaped = zip(self.parameters.items(), parts, strict=True)
        return {name: part.view(p.shape).to(p.dtype) for (name, p), part in shaped}

    def _one(self, flat: Tensor) -> Tensor:
        output = functional_call(self.module, self._unflatten(flat), self.inputs)
        return self.criterion(output)

    @torch.no_grad()
    def __call__(self, points: Tensor) -> Tensor:
        """Return the losses (R, P), or residuals (R, P, m), of candidates (R, P, n)."""
        values = vmap(self._one, chunk_size=self.batch_size)(points.flatten(0, 1))
        return values.unflatten(0, points.shape[:2])

    @torch.no_grad()
    def assign(self, point: Tensor) -> None:
        """Write one point (n) into the module."""
        for name, value in self._unflatten(point).items():
            self.parameters[name].copy_(value)
