"""Weight inheritance: a child starts from the tensors that it has in common with its parent.

A child so trained has seen more tokens than its own budget says, through its ancestors. Its score
and one from scratch must not meet in one ranking, so its result is another type and carries the
field `inherited`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kizzasi.models import ModelSpec, SequenceModel
from kizzasi.models.norm import Norm
from kizzasi.nas.evaluators.evaluator import Job, Measurement
from kizzasi.nas.evaluators.micro_training import MicroTrain
from kizzasi.train.leak import find_leak


@dataclass(frozen=True)
class Inheritance:
    """What a child took over.

    Args:
        parent: digest of the parent's spec.
        parent_tokens: that the parent's weights were trained on, its own ancestors' included.
        share: of the child's parameters that hold a parent's value, 0 to 1.
        overlap: whether tensors of other shapes gave what fits.
    """

    parent: str
    parent_tokens: int
    share: float
    overlap: bool


@dataclass(frozen=True)
class InheritedMeasurement:
    """A measurement of a child that did not start from scratch; `tokens` are the child's own."""

    measurement: Measurement
    inherited: Inheritance

    def to_dict(self) -> dict[str, Any]:
        """The fields of `Measurement`, and `inherited`."""
        return {**self.measurement.to_dict(), "inherited": asdict(self.inherited)}


@torch.no_grad()
def inherit(
    child: SequenceModel, parent: SequenceModel, *, parent_tokens: int = 0, overlap: bool = False
) -> Inheritance:
    """Write the parent's tensors into the child where they match; the rest stays as it is.

    Tensors match when name and shape are equal and every module that holds them, from the model
    down, is of the same type: a Mamba's out_proj does not become an attention's. Layers match by
    their place, so a layer put in shifts those behind it.

    Args:
        child: freshly built; its parameters are written to.
        parent: trained; stays as it is.
        parent_tokens: for the record.
        overlap: let a tensor of another shape, but as many dimensions, give its leading corner. A
            warm start and no more: where one matrix holds several maps (Mamba's in_proj), rows come
            to lie in another map.

    Returns:
        An Inheritance; a tied tensor counts once.
    """
    source, inherited, total = dict(parent.named_parameters()), 0, 0
    for name, tensor in child.named_parameters():
        total += tensor.numel()
        given = source.get(name)
        if given is None or given.ndim != tensor.ndim or not _same_role(child, parent, name):
            continue
        if given.shape == tensor.shape or overlap:
            inherited += _copy_corner(tensor, given)
    return Inheritance(parent.spec.digest, parent_tokens, inherited / total, overlap)


def train_child(
    evaluator: MicroTrain,
    spec: ModelSpec,
    parent: SequenceModel,
    tokens: int,
    seed: int,
    *,
    parent_tokens: int,
    overlap: bool = False,
    settings: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> InheritedMeasurement:
    """Micro-train a child that starts from its parent; the optimiser starts afresh.

    Args:
        evaluator: how to train and score.
        spec: of the child.
        parent: a trained model.
        tokens: the child's own budget.
        seed: of what is not inherited.
        parent_tokens, overlap: see `inherit`.
        settings: of the recipe.
        device: where to train.
    """
    training = evaluator.training(Job(spec, tokens, seed, settings or {}, device=device))
    inherited = inherit(training.model, parent, parent_tokens=parent_tokens, overlap=overlap)
    if leak := find_leak(training.model):
        return InheritedMeasurement(Measurement(None, failure=leak), inherited)
    start = time.perf_counter()
    failure = training.run(tokens)
    seconds = time.perf_counter() - start
    measurement = Measurement(
        score=None if failure else training.score(),
        spent=training.tokens,
        seconds=seconds,
        per_second=training.tokens / seconds,
        curve=tuple(training.curve),
        failure=failure,
    )
    return InheritedMeasurement(measurement, inherited)


def _same_role(child: nn.Module, parent: nn.Module, name: str) -> bool:
    """Whether the modules on the way down to a parameter are of the same types."""
    path = name.split(".")[:-1]
    for depth in range(len(path) + 1):
        ours, theirs = (m.get_submodule(".".join(path[:depth])) for m in (child, parent))
        if type(ours) is not type(theirs):
            return False
        if isinstance(ours, Norm) and isinstance(theirs, Norm) and ours.kind != theirs.kind:
            return False  # the gain of "rms_plus_one" is 1 + weight
    return True


def _copy_corner(tensor: Tensor, given: Tensor) -> int:
    """Copy what both shapes have in common, and say how many entries that was."""
    sizes = zip(tensor.shape, given.shape, strict=True)
    corner = tuple(slice(min(ours, theirs)) for ours, theirs in sizes)
    tensor[corner].copy_(given[corner])
    return given[corner].numel()
