"""A loss as a function of flat parameters: any module's.

An objective is any function from candidates (R, P, n) to losses (R, P), or to residuals (R, P, m).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from kizzasi.errors import ShapeError, SpecError

Loss = Callable[[Tensor], Tensor]


class ModuleObjective:
    """The loss of any module as a function of its flat parameters, many candidates at once.

    Candidates are run through one vectorised forward where the module allows that, and one after
    another where it does not (recurrent layers, branches on data, routing); `engine` says which
    and why. Gradients are off. Every candidate meets the same buffers, which
    stay as they are, and the same random numbers (dropout), so that its loss is its own.

    A criterion that returns a vector of residuals serves `GaussNewton`.

    Args:
        module: not changed, except by `assign`. Its device is where everything runs.
        criterion: loss, or residuals (m), from the module's output; close it over the targets.
        inputs: positional arguments of the module.
        keywords: its keyword arguments.
        names: parameters to search over, in this order; None means all that require gradients.
        batch_size: candidates per vectorised forward: memory against speed, never the result.
        vectorise: None to try; False for one after another; True refuses a module that cannot.

    Raises:
        SpecError: an unknown name, or nothing to search over.
    """

    def __init__(
        self,
        module: nn.Module,
        criterion: Callable[[Any], Tensor],
        *inputs: Any,
        keywords: Mapping[str, Any] | None = None,
        names: Sequence[str] | None = None,
        batch_size: int = 64,
        vectorise: bool | None = None,
    ) -> None:
        named = dict(module.named_parameters())
        unknown = set(names or ()) - set(named)
        if unknown:
            raise SpecError(f"names {sorted(unknown)} are not parameters; choose from {[*named]}")
        if names is None:
            names = [name for name, p in named.items() if p.requires_grad]
        if not sum(named[name].numel() for name in names):
            raise SpecError(
                f"{type(module).__name__} has nothing to search over: of its {len(named)} "
                "parameters none requires gradients; name some in names=[...]"
            )
        if batch_size < 1:
            raise SpecError(f"batch_size is {batch_size}; it must be at least 1")
        self.module, self.criterion, self.batch_size = module, criterion, batch_size
        self.inputs, self.keywords = inputs, dict(keywords or {})
        self.parameters = {name: named[name] for name in names}
        self._vectorise, self._refusal = vectorise, "as asked"
        self._must_vectorise = vectorise is True
        self._devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
        self._random = (
            torch.get_rng_state(),
            [(device, torch.cuda.get_rng_state(device)) for device in self._devices],
        )

    @property
    def engine(self) -> str:
        """How candidates are run, known after the first call: "vmap", or "loop" and why."""
        if self._vectorise is None:
            return "not run yet"
        return "vmap" if self._vectorise else f"loop: {self._refusal}"

    def __repr__(self) -> str:
        n = sum(p.numel() for p in self.parameters.values())
        return f"ModuleObjective({type(self.module).__name__}, n={n}, engine={self.engine!r})"

    @property
    def start(self) -> Tensor:
        """The module's present parameters, (1, n), at least float32; a complex one is two."""
        parts = [_real(p.detach()).flatten() for p in self.parameters.values()]
        dtype = torch.float32
        for part in parts:
            dtype = torch.promote_types(dtype, part.dtype)
        return torch.cat([part.to(dtype) for part in parts])[None]

    def _unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([_real(p).numel() for p in self.parameters.values()])
        shaped = {}
        for (name, p), part in zip(self.parameters.items(), parts, strict=True):
            # A copy: modules may count on memory of the parameter's own, to view it as complex.
            value = part.reshape(_real(p).shape).to(_real(p).dtype).clone()
            shaped[name] = torch.complex(*value.unbind(-1)) if p.is_complex() else value
        return shaped

    def _one(self, flat: Tensor) -> Tensor:
        """Run one candidate beside the module's own parameters, as vmap can."""
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        given = buffers | self._unflatten(flat)
        return self._loss(functional_call(self.module, given, self.inputs, self.keywords))

    def _alone(self, flat: Tensor) -> Tensor:
        """Run one candidate in the module itself, and put that back as it was."""
        data = {name: p.data for name, p in self.parameters.items()}
        buffers = [
            (owner, name, buffer)
            for owner in self.module.modules()
            for name, buffer in owner.named_buffers(recurse=False)
        ]
        try:
            for name, value in self._unflatten(flat).items():
                self.parameters[name].data = value
            for owner, name, buffer in buffers:
                setattr(owner, name, buffer.clone())
            return self._loss(self.module(*self.inputs, **self.keywords))
        finally:
            for name, kept in data.items():
                self.parameters[name].data = kept
            for owner, name, buffer in buffers:
                setattr(owner, name, buffer)

    def _loss(self, output: Any) -> Tensor:
        value = self.criterion(output)
        if not isinstance(value, Tensor) or value.ndim > 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(
                f"the criterion returned {shape}; it must return a scalar loss, or one dimension "
                "of residuals: .mean() or .flatten()"
            )
        return value

    @torch.no_grad()
    def __call__(self, points: Tensor) -> Tensor:
        """Return the losses (R, P), or residuals (R, P, m), of candidates (R, P, n)."""
        n = sum(_real(p).numel() for p in self.parameters.values())
        if points.ndim != 3 or points.shape[-1] != n:
            raise ShapeError(f"points are {tuple(points.shape)}; they must be (R, P, {n})")
        flat = points.flatten(0, 1)
        with torch.random.fork_rng(self._devices):
            values = self._vectorised(flat) if self._vectorise is not False else None
            if values is None:
                values = torch.stack([self._alike(self._alone, point) for point in flat])
        return values.unflatten(0, points.shape[:2])

    def _vectorised(self, flat: Tensor) -> Tensor | None:
        """Return the values by vmap, or None if this module does not allow it."""
        one = vmap(self._one, randomness="same")
        try:
            with warnings.catch_warnings():
                # An operator without a batching rule is looped over inside vmap: slower, as right.
                warnings.filterwarnings("ignore", "There is a performance drop")
                values = [self._alike(one, part) for part in flat.split(self.batch_size)]
        except (torch.cuda.OutOfMemoryError, MemoryError, ShapeError):
            raise
        except Exception as error:
            reason = str(error).strip().splitlines() or [""]
            self._refusal = f"vmap refuses ({type(error).__name__}: {reason[0]:.120})"
            if self._must_vectorise:
                raise SpecError(
                    f"{type(self.module).__name__}: {self._refusal}; leave vectorise out"
                ) from error
            self._alike(self._alone, flat[0])  # an error of the user's own appears as it is
            self._vectorise = False
            return None
        self._vectorise = True
        return torch.cat(values)

    def _alike(self, run: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
        """Run with the random numbers that every candidate gets."""
        cpu, others = self._random
        torch.set_rng_state(cpu)
        for device, state in others:
            torch.cuda.set_rng_state(state, device)
        return run(points)

    @torch.no_grad()
    def assign(self, point: Tensor) -> None:
        """Write one point, (n) or (1, n), into the module: for example `Minimum.x`.

        Raises:
            ShapeError: several points, or another n.
        """
        n = sum(_real(p).numel() for p in self.parameters.values())
        if point.shape not in ((n,), (1, n)):
            raise ShapeError(
                f"point is {tuple(point.shape)}; give one point ({n},) or (1, {n}), "
                "for example found.x[found.loss.argmin()]"
            )
        for name, value in self._unflatten(point.reshape(-1)).items():
            self.parameters[name].copy_(value)


def _real(p: Tensor) -> Tensor:
    return torch.view_as_real(p) if p.is_complex() else p
