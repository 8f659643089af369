"""Proxies from the gradient of the loss with respect to the parameters.

    g = d L / d theta,    L = mean loss of the batch

All treat connections or parameters as one pool or by branch, never by tensor: whether a mixer keeps
its projections in one matrix (Mamba) or in four (attention) says nothing about how it will learn.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kizzasi.models import SequenceModel
from kizzasi.nas.evaluators.zero_cost.parts import Batch, branches, connections, gradients, subject


@torch.enable_grad()
def grad_norm(model: SequenceModel, batch: Batch) -> float:
    """Measure how strongly the loss pulls at the parameters.

        || g ||_2   over all trainable parameters together

    Source: Abdelfattah et al. 2021, arXiv:2101.08134, section 3.2.
    Differs: one norm, not a sum of one per layer (see the top of the file); sleeping branches are
        woken (see parts.py).
    """
    own = subject(model, batch)
    trained: list[Tensor] = [p for p in own.model.parameters() if p.requires_grad]
    grads = gradients(own.row_losses().mean(), trained)
    return torch.stack([g.square().sum() for g in grads]).sum().sqrt().item()


@torch.enable_grad()
def snip(model: SequenceModel, batch: Batch) -> float:
    """Measure how much the loss would move if single connections were cut, to first order.

        sum |theta * g|   over the connections

    Source: Lee et al. 2019, arXiv:1810.02340, section 4.1; summed as in arXiv:2101.08134.
    Differs: cutting means theta = 0, which is defined for connections only; A_log, step sizes,
        phases, gains and biases are left out. Sleeping branches are woken, or they would count 0.
    """
    own = subject(model, batch)
    weights = list(connections(own.model).values())
    grads = gradients(own.row_losses().mean(), [*weights])
    return sum((w * g).abs().sum().item() for w, g in zip(weights, grads, strict=True))


@torch.enable_grad()
def zico(model: SequenceModel, batch: Batch) -> float:
    """Measure how large gradients are beside how much they vary from row to row.

        sum over branches l of  log  sum over theta in l of  mean_i |g_i| / std_i |g_i|

    g_i is the gradient of row i's own loss. theta with std 0 do not count: an embedding that no row
    uses. Cost: one backward pass per row.

    Args:
        batch: at least 2 rows; each plays the part of one of the paper's batches.

    Raises:
        ShapeError: fewer than 2 rows.

    Source: Li et al. 2023, arXiv:2301.11300, equation 11.
    Differs: a branch (or the stem) is a layer, since a sum of logarithms over tensors would grow
        with every matrix that is stored in two halves; only connections count.
    """
    own = subject(model, batch, least_rows=2)
    named = connections(own.model)
    weights: list[Tensor] = [*named.values()]
    total = [torch.zeros_like(w) for w in weights]
    squares = [torch.zeros_like(w) for w in weights]
    n_rows = len(own.inputs)
    rows = zip(own.inputs.split(1), own.targets.split(1), strict=True)
    for inputs, targets in rows:
        loss = own._replace(inputs=inputs, targets=targets).row_losses()
        for s, q, g in zip(total, squares, gradients(loss, weights), strict=True):
            s += g.abs()
            q += g.square()
    sums: dict[str, float] = {}
    names = branches(own.model)
    for name, s, q in zip(named, total, squares, strict=True):
        mean = s / n_rows
        std = (q / n_rows - mean.square()).clamp(min=0).sqrt()
        varies = std > 1e-9 * mean
        layer = next((branch for branch in names if name.startswith(f"{branch}.")), "stem")
        sums[layer] = sums.get(layer, 0.0) + (mean[varies] / std[varies]).sum().item()
    return sum(math.log(s) for s in sums.values() if s > 0)
