"""Proxies from what a model computes on a batch, before it has learned anything.

    y_l[n, s, c]   what branch l adds to the residual stream: row n, token s, channel c

The branches' outputs are the units of fisher and naswot. Every mixer has them, whatever is inside;
the usual units, outputs of ReLU, exist in few sequence models and not in the same places.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kizzasi.models import MixerOut, SequenceModel
from kizzasi.nas.evaluators.zero_cost.parts import Batch, Subject, branches, gradients, subject

EPSILON_SQUARED = 0.5


@torch.enable_grad()
def fisher(model: SequenceModel, batch: Batch) -> float:
    """Measure how much the loss would move if single channels of the branches were cut.

        sum over l, c of  1 / (2 b)  sum_n ( sum_s y_l[n, s, c] dL_n / dy_l[n, s, c] )^2

    L_n is the loss of row n.

    Source: Theis et al. 2018, arXiv:1801.05787, section 2.1; summed over a network in Turner et al.
        2020, arXiv:1906.04113; time takes the place of an image's two dimensions.
    Differs: channels of the branches' outputs (see the top of the file). Sleeping branches are
        woken, or all that they add would be 0.
    """
    own = subject(model, batch)
    added = _record(own)
    grads = gradients(own.row_losses().sum(), added)
    cut = [(y * g).sum(1) for y, g in zip(added, grads, strict=True)]
    return sum(each.square().sum().item() for each in cut) / (2 * len(own.inputs))


@torch.no_grad()
def naswot(model: SequenceModel, batch: Batch) -> float:
    """Measure how differently the units respond to different rows.

        log |det K|,   K[n, m] = number of units whose code is the same for the rows n and m

    The code of a unit is whether y_l[n, s, c] > 0. Targets are not looked at. -inf if two rows have
    one code, as equal rows do.

    Args:
        batch: at least 2 rows.

    Raises:
        ShapeError: fewer than 2 rows.

    Source: Mellor et al. 2021, arXiv:2006.04647, section 3 (version 3 of the paper).
    Differs: the units (see the top of the file).
    """
    own = subject(model, batch, least_rows=2)
    added = _record(own)
    own.model(own.inputs)
    codes = torch.cat([(y > 0).double().flatten(1) for y in added], 1)
    same = codes @ codes.T + (1 - codes) @ (1 - codes).T
    return torch.linalg.slogdet(same).logabsdet.item()


@torch.no_grad()
def logdet(model: SequenceModel, batch: Batch) -> float:
    """Measure the room that the final hidden states take up: the nats that code them.

        1/2 log det( I + d / (n e^2) Z^T Z ),    e^2 = 0.5

    Z (n, d) are the n = b t inputs of the head, each divided by its length. 0 if there were none;
    at most d / 2 log(1 + 1 / e^2), when they point everywhere alike. Targets are not looked at.

    Source: Yu et al. 2020, arXiv:2006.08558, section 2.1 (the coding rate). That the spread of
        hidden states may rank recurrent networks: Serianni & Kalita 2023, arXiv:2306.00288.
    Differs: the states of all tokens are one set, since their number differs between batches.
    """
    own = subject(model, batch)
    states: list[Tensor] = []
    head = own.model.stem.head

    def look(x: Tensor) -> Tensor:
        states.append(x)
        return head(x)

    own.model.stem.head = look
    own.model(own.inputs)
    z = nn.functional.normalize(states[0].flatten(0, 1), dim=-1)
    n, d = z.shape
    spread = torch.eye(d, dtype=z.dtype, device=z.device) + d / (n * EPSILON_SQUARED) * (z.T @ z)
    return torch.linalg.slogdet(spread).logabsdet.item() / 2


def _record(own: Subject) -> list[Tensor]:
    """The list that the coming forward pass fills with every branch's output."""
    added: list[Tensor] = []

    def keep(_branch: nn.Module, _args: object, out: MixerOut) -> None:
        added.append(out.y)

    for branch in branches(own.model).values():
        branch.register_forward_hook(keep)
    return added
