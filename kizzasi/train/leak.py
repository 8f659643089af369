"""The no-leak gate: no score counts before the model is known not to see the future."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from kizzasi.models import SequenceModel, Signal, Tokens

TOLERANCE = 1e-6  # float64; FFTs spread rounding errors of about 1e-15 over the whole sequence


@torch.no_grad()
def find_leak(model: SequenceModel, seq_len: int = 48) -> str | None:
    """Look for a way in which a later input moves an earlier output.

    Changes token t for several t and compares all logits before t; then compares the parallel form
    with the recurrent one. Runs on a perturbed float64 copy, since a branch that starts at zero
    would hide its leak.

    Args:
        model: any model; it is not changed.
        seq_len: length of the probe.

    Returns:
        None if nothing leaks, else the reason in one sentence.
    """
    if not model.spec.causal:
        return "declares that outputs depend on later inputs"
    probe = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in probe.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_(0.02 * noise.to(parameter))
    inputs = _probe_inputs(probe, seq_len, generator)
    clean = probe(inputs)
    for t in sorted({1, seq_len // 3, seq_len // 2, seq_len - 1}):
        changed = inputs.clone()
        changed[:, t:] = inputs[:, t:].roll(1, dims=0)
        moved = (probe(changed).logits[:, :t] - clean.logits[:, :t]).abs().max().item()
        if not moved <= TOLERANCE:
            return f"leaks the future: inputs from {t} on move logits before {t} by {moved:.2g}"
    head = probe(inputs[:, :-1])
    stepped = probe.step(inputs[:, -1], head.state).logits
    apart = (stepped - clean.logits[:, -1]).abs().max().item()
    if not apart <= TOLERANCE:
        return f"the recurrent form differs from the parallel one by {apart:.2g}"
    return None


def _probe_inputs(model: SequenceModel, seq_len: int, generator: torch.Generator) -> Tensor:
    """Two rows that differ everywhere, so that swapping them changes every position."""
    stem, device = model.spec.stem, next(model.stem.parameters()).device
    if isinstance(stem, Signal):
        shape = (2, seq_len, stem.n_in)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    assert isinstance(stem, Tokens)
    row = torch.randint(stem.vocab_size, (1, seq_len), generator=generator)
    return torch.cat([row, (row + 1) % stem.vocab_size]).to(device)
