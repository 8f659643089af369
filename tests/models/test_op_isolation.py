"""What is not a number stays in its document: outputs, states and gradients of all others."""

import pytest
import torch
from op_cases import OPS, STARTS, every_op
from tolerance import assert_close

from kizzasi.models.ops import conv, devices, documents, scan_blocks

DOCUMENT = STARTS.cumsum(1)
BAD = [torch.nan, torch.inf, -torch.inf]


@pytest.fixture(autouse=True, params=["fast", "loop", "no questions", "as on CUDA"])
def form(request, monkeypatch):
    """Both forms; and the fast one where the device does not say whether all numbers are finite."""
    monkeypatch.setattr(conv, "BLOCK_ELEMENTS", 20)
    monkeypatch.setattr(scan_blocks, "BLOCK_STATES", 1)
    if request.param == "no questions":
        monkeypatch.setattr(documents, "all_finite", lambda *inputs: False)
    if request.param == "as on CUDA":
        monkeypatch.setattr(devices, "on_cpu", lambda x: False)
    return 1 if request.param == "loop" else 0


def leaves_of(outputs):
    y, state = outputs
    return [y, state] if isinstance(state, torch.Tensor) else [y, *state]


def poisoned(inputs, state_from, place, value):
    """The inputs with one bad number in every tensor: at a token, or in the state before it."""
    result = []
    for i, x in enumerate(inputs):
        if x is None:
            result.append(None)
            continue
        x = x.clone()
        if place == "state" and i >= state_from:
            x[0].view(-1)[0] = value
        if place != "state" and x.shape[:2] == STARTS.shape and i < state_from:
            x[(*place, *[0] * (x.ndim - 2))] = value
        result.append(x.requires_grad_())
    return result


@every_op
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("place", ["state", (0, 0), (0, 3), (0, 6), (0, 8), (1, 2), (1, 5)])
def test_other_documents_are_untouched(name, form, place, value):
    op, (make, state_from) = OPS[name][form], OPS[name][2:]
    inputs, options = make()
    row, token = (0, 0) if place == "state" else place
    if name != "conv" and place == "state" and STARTS[0, 0]:
        pytest.skip("the state is seen by nobody")
    touched = torch.zeros_like(STARTS)
    touched[row] = DOCUMENT[row] == DOCUMENT[row, token]
    results = []
    for given in (
        [None if x is None else x.clone().requires_grad_() for x in inputs],
        poisoned(inputs, state_from, place, value),
    ):
        y, *state = leaves_of(op(*given, starts=STARTS, **options))
        kept = torch.ones(len(STARTS), dtype=torch.bool)
        kept[row] = not touched[row, -1]
        out = [y[~touched], *(leaf[kept] for leaf in state)]
        loss = sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in out)
        given = [x for x in given if x is not None]
        grads = torch.autograd.grad(loss, given, allow_unused=True)
        per_token = [
            g[~touched]
            for g, x in zip(grads, given, strict=True)
            if g is not None and x.shape[:2] == STARTS.shape
        ]
        results.append((*out, *per_token))
    for actual, expected in zip(results[1], results[0], strict=True):
        assert actual.isfinite().all()
        assert_close(actual, expected)


@every_op
def test_the_bad_document_does_not_look_fine(name, form):
    """Nothing finite comes of what is not: its later outputs and its state are NaN."""
    op, (make, state_from) = OPS[name][form], OPS[name][2:]
    inputs, options = make()
    y, *state = leaves_of(
        op(*poisoned(inputs, state_from, (1, 6), torch.nan), starts=STARTS, **options)
    )
    assert y[1, 6].isnan().any()
    assert y[1, :6].isfinite().all()
    assert any(leaf[1].isnan().any() for leaf in state)
