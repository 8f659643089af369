"""The no-leak gate: no score counts before the model is known not to see the future.

Glossary
    unit     a length after which a part does something else: a chunk of a scan, a window, a stride
    edge     a position beside a multiple of a unit, where a leak would first show
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kizzasi.models import ModelSpec, SequenceModel, Signal, Tokens

TOLERANCE = 1e-6  # float64; FFTs spread rounding errors of about 1e-15 over the whole sequence
SCAN_CHUNK = 64  # the longest chunk of our own scans
SHORTEST = 48
UNIT_NAMES = ("chunk", "window", "block", "stride", "segment", "every", "factor")
NOT_UNITS = ("block_d", "block_rows")
MOST_EDGES = 12  # positions that are tried, evenly thinned out


@torch.no_grad()
def find_leak(
    model: SequenceModel | Callable[[Tensor], Tensor],
    seq_len: int = 0,
    *,
    inputs: Tensor | None = None,
) -> str | None:
    """Look for a way in which a later input moves an earlier output.

    Changes the inputs from t on, for t at every unit's edges, and compares all outputs before t, in
    evaluation and, with fixed random numbers, in training mode; then compares the parallel form
    with the recurrent one at each of them. Runs on a perturbed float64 copy, since a branch that
    starts at zero would hide its leak. Latent bits are drawn from the prior: what an encoder sees
    of the future in training is charged to the score.

    Args:
        model: any model, which is not changed; or a function of inputs (2, t) or (2, t, n_in) that
            returns outputs (2, t, n).
        seq_len: the length of training; the probe is at least as long, and longer than twice the
            longest unit of the model.
        inputs: (2, t, ...) for a function: two rows that differ everywhere.

    Returns:
        None if nothing leaks, else the reason in one sentence.
    """
    if not isinstance(model, SequenceModel):
        assert inputs is not None, "a function needs inputs to look at"
        return _moved(model, inputs, _edges(len(inputs[0]), (SCAN_CHUNK,)))
    if not model.spec.causal:
        return "declares that outputs depend on later inputs"
    probe = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in probe.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_(0.02 * noise.to(parameter))
    length = probe_length(model.spec, seq_len)
    inputs = _probe_inputs(probe, length, generator)
    edges = _edges(length, units_of(model.spec))
    leak = _moved(lambda x: probe(x).logits, inputs, edges)
    if leak is None and model.spec.dropout > 0 and not model.spec.encodes:
        probe.train()
        leak = _moved(lambda x: _fixed(probe, x), inputs, edges[:: max(1, len(edges) // 3)])
        probe.eval()
    return leak or _forms_differ(probe, inputs, edges)


def units_of(spec: ModelSpec) -> tuple[int, ...]:
    """Every unit of a spec, rising; that of our own scans is always among them."""
    found = {SCAN_CHUNK}
    for _, part in spec.parts():
        found.update(_units(part))
    return tuple(sorted(found))


def probe_length(spec: ModelSpec, seq_len: int = 0) -> int:
    """2 x (longest unit) + 1, at least seq_len, and no longer than the stem's positions."""
    length = max(2 * units_of(spec)[-1] + 1, seq_len, SHORTEST)
    known = spec.stem.max_positions if isinstance(spec.stem, Tokens) else None
    return length if known is None else min(length, known)


def _units(part: Any) -> Iterator[int]:
    """Whole numbers of a part's fields that are named like a unit, nested parts included."""
    if dataclasses.is_dataclass(part):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            named = any(word in field.name for word in UNIT_NAMES)
            if isinstance(value, int) and not isinstance(value, bool):
                if named and field.name not in NOT_UNITS and value > 1:
                    yield value
            else:
                yield from _units(value)
    elif isinstance(part, (tuple, list)):
        for one in part:
            yield from _units(one)


def _edges(length: int, units: tuple[int, ...]) -> list[int]:
    """Positions 1 .. length - 1 beside the first two multiples of every unit, and some between."""
    found = {1, length // 3, length // 2, length - 1}
    for unit in units:
        found.update(k * unit + off for k in (1, 2) for off in (-1, 0, 1))
    inside = sorted(t for t in found if 0 < t < length)
    step = -(-len(inside) // MOST_EDGES)
    kept = {t for unit in units[-1:] for t in (unit - 1, unit, unit + 1) if 0 < t < length}
    return sorted({*inside[::step], *kept})


def _moved(model: Callable[[Tensor], Tensor], inputs: Tensor, edges: list[int]) -> str | None:
    clean = model(inputs)
    for t in edges:
        changed = inputs.clone()
        changed[:, t:] = inputs[:, t:].roll(1, dims=0)
        moved = (model(changed)[:, :t] - clean[:, :t]).abs().max().item()
        if not moved <= TOLERANCE:
            return f"leaks the future: inputs from {t} on move logits before {t} by {moved:.2g}"
    return None


def _fixed(model: SequenceModel, inputs: Tensor) -> Tensor:
    """Logits with the same random numbers at every call."""
    device = inputs.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.random.manual_seed(0)
        return model(inputs).logits


def _forms_differ(probe: SequenceModel, inputs: Tensor, edges: list[int]) -> str | None:
    clean = probe(inputs).logits
    for t in edges:
        head = probe(inputs[:, :t])
        stepped = probe.step(inputs[:, t], head.state).logits
        apart = (stepped - clean[:, t]).abs().max().item()
        if not apart <= TOLERANCE:
            return f"the recurrent form differs from the parallel one by {apart:.2g} at {t}"
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
