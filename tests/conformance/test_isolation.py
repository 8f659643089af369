"""NaN and infinity in padding or in another document touch nothing: not an output, not a state, not
a gradient of the rest, and no weight's."""

from dataclasses import replace

import pytest
import torch
from cases import CAUSAL, D_MODEL, every_part, model_spec
from tolerance import assert_close

from kizzasi.models import Signal, build_model
from kizzasi.models.call import Call
from kizzasi.models.ops import devices
from kizzasi.models.state import map_state, named_leaves


@pytest.fixture(params=[torch.nan, -torch.inf])
def value(request, monkeypatch):
    """A bad number; the second as on a device that does not say whether all numbers are finite."""
    if request.param == -torch.inf:
        monkeypatch.setattr(devices, "answers", lambda x: False)
    return request.param


def make(name):
    spec = replace(model_spec(name), stem=Signal(3, 2))
    model = build_model(spec, seed=1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def frames(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, 3, generator=generator, dtype=torch.float64)


def results(model, x, kept, rows=slice(None), **options):
    """Logits and gradients where `kept`, the gradients of all weights, and the states of `rows`."""
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    out = model(x, **options)
    logits = out.logits[kept]
    loss = (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()
    loss.backward()
    found = {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    found |= {n: leaf[rows] for n, leaf in named_leaves(out.state)}
    return {"logits": logits, "gradient of x": x.grad[kept], **found}, out


def assert_untouched(actual, expected):
    for name, value in expected.items():
        if value is None or not value.dtype.is_floating_point:
            continue
        assert actual[name].isfinite().all(), name
        assert_close(actual[name], value, msg=name)


@every_part
def test_padding(name, value):
    model, x = make(name), frames(3, 12)
    mask = torch.arange(12) >= torch.tensor([[5], [0], [11]])
    expected, _ = results(model, x.masked_fill(~mask[..., None], 0.3), mask, mask=mask)
    actual, out = results(model, x.masked_fill(~mask[..., None], value), mask, mask=mask)
    assert_untouched(actual, expected)
    if CAUSAL[name]:
        assert model(frames(3, 2), out.state).logits.isfinite().all()


@every_part
@pytest.mark.parametrize("place", [(0, 7), (1, 11)])
def test_another_document(name, value, place):
    model, x = make(name), frames(2, 12)
    ids = torch.tensor([[0] * 6 + [1] * 3 + [2] * 3, [3] + [4] * 11])
    row, time = place
    odd = torch.zeros_like(ids, dtype=torch.bool)
    odd[row] = ids[row] == ids[row, time]
    rows = [r for r in range(2) if not odd[r, -1]]
    expected, _ = results(model, x, ~odd, rows, segment_ids=ids)
    x[row, time, 1] = value
    actual, out = results(model, x, ~odd, rows, segment_ids=ids)
    for key in list(expected):  # the other document's frames are other numbers
        if key.startswith("gradient of blocks") or "stem" in key or "norm" in key:
            assert actual[key] is None or actual[key].isfinite().all(), key
            del expected[key]
    assert_untouched(actual, expected)
    assert out.logits[row, time].isnan().all(), "the bad document looks fine"
    if CAUSAL[name] and odd[row, -1]:
        assert model(frames(2, 1), out.state).logits[row].isnan().any()


@every_part
def test_a_bad_state_is_forgotten_at_a_start(name, value):
    """What another document has left in the state, NaN included."""
    if not CAUSAL[name]:
        pytest.skip("not causal: no state to carry")
    model = make(name)
    state = model(frames(2, 5), segment_ids=torch.zeros(2, 5, dtype=torch.int64)).state
    spoilt = map_state(lambda t: t * value if t.is_floating_point() else t, state)
    ids = torch.tensor([[1, 1, 1, 2], [0, 0, 3, 3]])
    fresh = ids > 0
    expected = model(frames(2, 4, 1), state, segment_ids=ids)
    actual = model(frames(2, 4, 1), spoilt, segment_ids=ids)
    assert_close(actual.logits[fresh], expected.logits[fresh])
    more = frames(2, 3, 2)
    assert_close(model(more, actual.state).logits, model(more, expected.state).logits)


@every_part
def test_a_block_by_itself(name, value):
    """Without the model, which sets bad frames aside, the ops keep them within their document."""
    block = make(name).blocks[0]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 12, D_MODEL, dtype=torch.float64, generator=generator)
    segments = torch.tensor([[0] * 6 + [1] * 3 + [2] * 3, [0] + [1] * 11])
    expected = block(x, None, call=Call.of(x, segments))
    x[0, 7, 5] = value
    actual = block(x, None, call=Call.of(x, segments))
    others = torch.ones(2, 12, dtype=torch.bool)
    others[0, 6:9] = False
    assert_close(actual.y[others], expected.y[others])
    assert actual.y[0, 7:9].isnan().any(-1).all(), "the bad document looks fine"
    for (leaf_name, a), (_, b) in zip(
        named_leaves(actual.state), named_leaves(expected.state), strict=True
    ):
        if a.dtype.is_floating_point:
            assert_close(a, b, msg=leaf_name)
