"""What a query does not see may be NaN: outputs and gradients of all others stay as they are."""

import pytest
import torch
from tolerance import assert_close

from kizzasi.models.ops import attention as ops
from kizzasi.models.ops import documents
from kizzasi.models.ops.attention import attention, attention_ref, visibility

B, H, KV, T, S, D = 2, 4, 2, 6, 9, 3
DOCUMENT = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 1, 1, 1]])
POSITION = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1], [0, 1, 2, 0, 1, 2, 3, 4, 5]])
VISIBLE = visibility(DOCUMENT[:, S - T :], POSITION[:, S - T :], DOCUMENT, POSITION)
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 5.0},
    "bias": {"bias": torch.linspace(-1, 0, S, dtype=torch.float64).expand(1, H, T, S)},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def made(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def inputs():
    return made(B, H, T, D, seed=0), made(B, KV, S, D, seed=1), made(B, KV, S, D, seed=2)


def results(run, given, touched, **options):
    """Outputs and gradients outside the document of row 0 that is touched."""
    given = [x.clone().requires_grad_() for x in given]
    y = run(*given, visible=VISIBLE, **options)
    keys = touched != DOCUMENT
    keys[1] = True
    queries = keys[:, S - T :]
    kept = y.transpose(1, 2)[queries]
    loss = (kept * torch.linspace(-1, 1, kept.numel()).view_as(kept)).sum()
    grads = torch.autograd.grad(loss, given)
    sides = (queries, keys, keys)
    return y, kept, *(g.transpose(1, 2)[side] for g, side in zip(grads, sides, strict=True))


@every_option
@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("run", [attention, attention_ref])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("slot", [1, 4, 5, 8])
def test_other_documents_are_untouched(run, slot, value, options, asked, monkeypatch):
    if not asked:  # as on a device that does not say whether all numbers are finite
        monkeypatch.setattr(ops, "all_finite", lambda *inputs: False)
    touched = int(DOCUMENT[0, slot])
    _, *expected = results(run, inputs(), touched, **options)
    q, k, v = inputs()
    k[0, 0, slot, 1] = v[0, 1, slot, 2] = value
    if slot >= S - T:
        q[0, 2, slot - (S - T), 0] = value
    y, *actual = results(run, (q, k, v), touched, **options)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b)
    seen = VISIBLE[0, 0, :, slot]
    assert seen.any()
    assert y[0].transpose(0, 1)[seen].isnan().all()


@every_option
def test_shared_keys_written_out_are_shared_keys(options, monkeypatch):
    """CUDA gets the keys once a head wherever a mask is given."""
    expected = results(attention_ref, inputs(), 7, **options)
    monkeypatch.setattr(ops, "_expands", lambda q, mask: True)
    for a, b in zip(results(attention, inputs(), 7, **options), expected, strict=True):
        assert_close(a, b)


def test_a_finite_sum_means_finite_terms():
    x = torch.ones(3, 4)
    assert documents.all_finite(x, x.bfloat16())
    for bad in (torch.nan, torch.inf, -torch.inf):
        y = x.clone()
        y[1, 2] = bad
        assert not documents.all_finite(x, y)
    y[0, 0] = torch.inf
    assert not documents.all_finite(y)
