"""What the proxies share: a private copy to work on, which tensors are connections, and losses.

Every proxy works on a float64 copy in evaluation mode, so that the model it was given stays as it
is, nothing is drawn (dropout, routing noise), and a score does not hang on rounding.

Glossary
    branch        a block's mixer or channel: what it returns is added to the residual stream
    connection    an entry of a matrix, also of one in a stack, or of a convolution's filter. What a
                  module declares float32 is none: decays, step sizes, phases and routers, where
                  zero does not mean absent (A_log = 0 is a decay rate of 1) and a sign no
                  direction. Nor are gains, biases and tensors of other shapes, whose meaning only
                  their mixer knows.
    asleep        a matrix of zeros: RWKV's branches end in one, and then every other gradient
                  inside the branch is zero, whatever it could learn

Symbols: b rows of a batch, t time, d d_model.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.errors import ShapeError
from kizzasi.models import Mixer, SequenceModel
from kizzasi.models.init import residual_scale
from kizzasi.models.layers.layer import LayerModule
from kizzasi.models.norm import KeepFloat32
from kizzasi.train.task import IGNORE

# inputs (b, t) ids or (b, t, n_in) frames; targets (b, t) ids, IGNORE where not scored, or frames
Batch: TypeAlias = tuple[Tensor, Tensor]


class Subject(NamedTuple):
    """A private copy of the model, and the batch that goes with it."""

    model: SequenceModel
    inputs: Tensor
    targets: Tensor

    def row_losses(self) -> Tensor:
        """(b,) the mean loss over the scored positions of every row; no auxiliary losses."""
        return row_losses(self.model(self.inputs).logits, self.targets)


def subject(model: SequenceModel, batch: Batch, least_rows: int = 1) -> Subject:
    """Copy the model and wake what is asleep, by the same draw on every call.

    Woken matrices get what `init` gives to the last Linear of other branches, so that families
    differ by what they compute and not by how they start: U(-s, s), s = 1 / sqrt(2 n_layers n_in).
    n_in is taken as the longer side, since some mixers store their matrices transposed.

    Raises:
        ShapeError: the batch has fewer than `least_rows` rows.
    """
    inputs, targets = (x.double() if x.is_floating_point() else x for x in batch)
    if len(inputs) < least_rows:
        raise ShapeError(
            f"batch: {len(inputs)} rows, and this proxy compares rows; give at least {least_rows}"
        )
    own = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in own.parameters():
            if parameter.requires_grad and parameter.ndim == 2 and not parameter.any():
                scale = residual_scale(own.spec.depth) / math.sqrt(max(parameter.shape))
                noise = torch.empty(parameter.shape, dtype=torch.float64)
                parameter.copy_(noise.uniform_(-scale, scale, generator=generator))
    return Subject(own, inputs, targets)


def connections(model: nn.Module) -> dict[str, nn.Parameter]:
    """The connections by name; a tied tensor counts once."""
    declared = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, KeepFloat32)
        for name in module.float32_parameters
    }
    filters = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Conv1d)}
    stacked = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, Mixer)
        for name in module.matrices
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in declared
        if parameter.ndim == 2 or name in filters or name in stacked
    }


def branches(model: SequenceModel) -> dict[str, Mixer]:
    """The branches by name, in the order in which they run."""
    return {
        f"{path}.{name}": part
        for path, layer in model.blocks.named_modules(prefix="blocks")
        if isinstance(layer, LayerModule)
        for name, part in layer.named_children()
        if isinstance(part, Mixer) and not isinstance(part, LayerModule)
    }


def row_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(b,) cross entropy in nats (ids) or squared error (frames), a mean over scored positions."""
    if targets.is_floating_point():
        return (logits - targets).square().flatten(1).mean(1)
    flat, ids = logits.flatten(0, 1), targets.flatten()
    each = F.cross_entropy(flat, ids, ignore_index=IGNORE, reduction="none").view(targets.shape)
    return each.sum(1) / (targets != IGNORE).sum(1).clamp(min=1)


def gradients(output: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """d output / d each tensor; zeros for one that output does not depend on."""
    return torch.autograd.grad(output, tensors, allow_unused=True, materialize_grads=True)
