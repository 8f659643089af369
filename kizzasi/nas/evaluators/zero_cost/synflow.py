"""SynFlow: how much signal the positive paths of the network carry."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kizzasi.models import SequenceModel
from kizzasi.models.norm import HeadNorm, Norm
from kizzasi.nas.evaluators.zero_cost.parts import Batch, connections, gradients, subject


@torch.enable_grad()
def synflow(model: SequenceModel, batch: Batch) -> float:
    """Sum how much of the output flows through every connection, all signs made positive.

        sum |theta * dR / dtheta|,    R = mean over tokens of sum of logits,    theta <- |theta|

    theta are the connections. In a network that is linear in each of its layers every layer sums to
    R. Targets are not looked at.

    Source: Tanaka et al. 2020, arXiv:2006.05467, section 5; as a score: arXiv:2101.08134.
    Differs:
      * The input is the batch, not ones. Ids cannot be ones, and their one-hot vectors are positive
        already, so the flow starts in the embedding. Were all positions equal, softmax would have
        nothing to choose between, and queries and keys would count zero.
      * What is no connection keeps its sign: |A_log| or |log dt| would be another decay, not the
        same one without a sign. So do biases; they carry nothing from the input.
      * Norms stay, since gates multiply the stream with itself: without norms a gated branch is a
        polynomial of its input, and over the depth its degree multiplies until float64 overflows.
        A norm divides by the root mean square, taken as a constant in the gradient; otherwise the
        score of everything before it would cancel. It neither centres nor shifts, since both
        subtract. Norms inside an operation (of the delta rule's keys, Mamba-2's gated norm) stay.
      * Gates, softmax and decays have the gradient that they have at this point, so some flow may
        be negative: hence the absolute value.
    """
    own = subject(model, batch)
    weights = list(connections(own.model).values())
    with torch.no_grad():
        for weight in weights:
            weight.abs_()
    for module in own.model.modules():
        if isinstance(module, (Norm, HeadNorm)):
            module.forward = _positive_norm(module)
    inputs = own.inputs.abs() if own.inputs.is_floating_point() else own.inputs
    flow = own.model(inputs).logits.sum(-1).mean()
    grads = gradients(flow, [*weights])
    return sum((w * g).abs().sum().item() for w, g in zip(weights, grads, strict=True))


def _positive_norm(norm: Norm | HeadNorm) -> partial[Tensor]:
    plus_one = isinstance(norm, Norm) and norm.kind == "rms_plus_one"
    gain = (norm.weight.detach() + plus_one).abs()
    return partial(_divide_by_constant, gain=gain, eps=norm.eps)


def _divide_by_constant(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x gain / rms(x), the rms over the last dimension being a constant; gain fits x's end."""
    rms = x.detach().square().mean(-1, keepdim=True).add(eps).sqrt()
    n_dims = 2 if gain.numel() > x.shape[-1] else 1  # a HeadNorm's gain spans all heads
    return x / rms * gain.view(x.shape[-n_dims:])
