"""Proxies from the gradient of the outputs with respect to the inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from kizzasi.models import SequenceModel
from kizzasi.nas.evaluators.zero_cost.parts import Batch, gradients, subject

SMALL = 1e-5


@torch.enable_grad()
def jacob_cov(model: SequenceModel, batch: Batch) -> float:
    """Measure how differently the model maps around different rows.

        - sum_i ( log(v_i + k) + 1 / (v_i + k) ),    k = 1e-5

    v_i are the eigenvalues of the (b, b) correlation matrix of the rows of J,

        J[n] = d (sum of all logits of row n) / d (embeddings of row n), flattened

    Highest when no two rows are correlated: -b. Targets are not looked at.

    Args:
        batch: at least 2 rows.

    Raises:
        ShapeError: fewer than 2 rows.

    Source: Mellor et al. 2020, arXiv:2006.04647, section 3 (version 1 of the paper); as in
        arXiv:2101.08134.
    Differs: ids have no derivative, so it is taken at the embeddings, before any norm of theirs.
    """
    own = subject(model, batch, least_rows=2)
    embed = own.model.stem.embed
    leaves: list[Tensor] = []

    def leaf(inputs: Tensor, position: Tensor) -> Tensor:
        leaves.append(embed(inputs, position).detach().requires_grad_())
        return leaves[0]

    own.model.stem.embed = leaf
    (jacobian,) = gradients(own.model(own.inputs).logits.sum(), leaves)
    v = torch.linalg.eigvalsh(torch.corrcoef(jacobian.flatten(1))) + SMALL
    return -(v.log() + 1 / v).sum().item()
