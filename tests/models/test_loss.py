"""The loss counts what it is told to count, and refuses what does not fit."""

import pytest
import torch
import torch.nn.functional as F

from kizzasi.errors import ShapeError
from kizzasi.models import BlockSpec, ModelSpec, Signal, build_model
from kizzasi.models.loss import mean_loss
from kizzasi.models.mixers.mamba import MambaSpec

B, T, V = 3, 7, 11


def case(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, T, V, dtype=torch.float64, generator=generator).to(dtype)
    return logits.requires_grad_(), torch.randint(V, (B, T), generator=generator)


def gradient(loss, x):
    return torch.autograd.grad(loss, x)[0]


def by_hand(logits, targets, weights):
    each = -logits.float().double().log_softmax(-1).gather(-1, targets[..., None].clamp(0))[..., 0]
    keep = weights != 0
    return (each[keep] * weights[keep]).sum() / weights[keep].sum()


@pytest.mark.parametrize("ignored", ["none", "some", "a row", "all"])
def test_labels_of_minus_100_do_not_count(ignored):
    logits, y = case()
    y[
        {"none": ([], []), "some": (slice(None), slice(4)), "a row": 1, "all": slice(None)}[ignored]
    ] = -100
    loss = mean_loss(logits, y)
    if ignored == "all":
        assert loss == 0
        assert torch.equal(gradient(loss, logits), torch.zeros_like(logits))
        return
    want = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        gradient(loss, logits), gradient(want, logits), rtol=1e-12, atol=1e-15
    )


def test_another_id_may_be_ignored_also_one_inside_the_vocabulary():
    logits, y = case()
    y[:, 0] = 0
    want = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=0)
    torch.testing.assert_close(mean_loss(logits, y, ignore_index=0), want, rtol=1e-12, atol=0)
    y[:, 0] = -1
    want = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)
    torch.testing.assert_close(mean_loss(logits, y, ignore_index=-1), want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["bool", "int", "weights", "column", "row"])
def test_a_mask_weighs_the_mean(kind):
    logits, y = case()
    y[0, 2] = -100
    mask = torch.arange(B * T).view(B, T) % 3 != 1
    weights = {
        "bool": mask,
        "int": mask.int(),
        "weights": mask * torch.linspace(0.01, 0.02, B * T).view(B, T),
        "column": torch.tensor([[1], [0], [1]]),
        "row": mask[:1],
    }[kind]
    wide = weights.expand(B, T) * (y != -100)
    loss = mean_loss(logits, y, weights)
    torch.testing.assert_close(loss, by_hand(logits, y, wide.double()), rtol=1e-7, atol=0)


def test_nothing_counts():
    logits, y = case()
    assert mean_loss(logits, y, torch.zeros(B, T, dtype=torch.bool)) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_does_not_count_may_be_anything(bad):
    logits, y = case()
    y[0, :2], mask = -100, torch.ones(B, T, dtype=torch.bool)
    mask[1, 3:] = False
    hidden = ~mask | (y == -100)
    dirty = torch.where(hidden[..., None], bad, logits.detach()).requires_grad_()
    want, loss = mean_loss(logits, y, mask), mean_loss(dirty, y, mask)
    assert torch.equal(loss, want)
    assert torch.equal(gradient(loss, dirty), gradient(want, logits))


def test_frames():
    logits, _ = case()
    frames, mask = torch.randn(B, T, V, dtype=torch.float64), torch.rand(B, T) < 0.5
    torch.testing.assert_close(mean_loss(logits, frames), F.mse_loss(logits, frames))
    want = F.mse_loss(logits[mask], frames[mask])
    dirty = torch.where(mask[..., None], frames, float("nan"))
    loss = mean_loss(logits, dirty, mask)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient(loss, logits), gradient(want, logits))


@pytest.mark.parametrize(
    ("targets", "mask", "message"),
    [
        (torch.zeros(T, B).long(), None, r"expected ids \(3, 7\), got \(7, 3\)"),
        (torch.zeros(B, 1).long(), None, r"expected ids \(3, 7\), got \(3, 1\)"),
        (torch.zeros(B, T), None, r"expected frames \(3, 7, 11\), got \(3, 7\)"),
        (torch.zeros(B, T, 1), None, r"expected frames \(3, 7, 11\), got \(3, 7, 1\)"),
        (torch.zeros(B, T).bool(), None, r"got \(3, 7\) torch.bool"),
        (torch.zeros(B, T).long(), torch.ones(T, B), r"mask: expected \(3, 7\).* got \(7, 3\)"),
        (torch.zeros(B, T).long(), torch.tensor(3), r"mask: expected \(3, 7\).* got \(\)"),
        (torch.full((B, T), V), None, r"id 11 is outside the vocabulary of 11; mark .* -100"),
        (torch.full((B, T), -1), None, r"id -1 is outside the vocabulary"),
    ],
)
def test_what_does_not_fit_is_refused(targets, mask, message):
    with pytest.raises(ShapeError, match=message):
        mean_loss(case()[0], targets, mask)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_every_integer_dtype(dtype):
    logits, y = case()
    assert torch.equal(mean_loss(logits, y.to(dtype)), mean_loss(logits, y))


def test_low_precision_is_computed_in_float32():
    logits, y = case(torch.bfloat16)
    loss = mean_loss(logits, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), by_hand(logits, y, torch.ones(B, T)), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("shape", [(1, 7), (7, 7), (2, 7)])
def test_one_channel_is_not_spread(shape):
    model = build_model(ModelSpec(8, (BlockSpec(MambaSpec()),), Signal(3, 1)))
    out, y = model(torch.randn(*shape, 3)), torch.randn(shape)
    with pytest.raises(ShapeError, match="frames"):
        out.loss(y)
    torch.testing.assert_close(out.loss(y[..., None]), F.mse_loss(out.logits[..., 0], y))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_frames_of_padding_may_be_anything(bad):
    model = build_model(ModelSpec(8, (BlockSpec(MambaSpec()),), Signal(3, 2)))
    x, y = torch.randn(2, 5, 3), torch.randn(2, 5, 2)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    model(x, mask=mask).loss(y, mask).backward()
    want = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    dirty = (torch.where(mask[..., None], t, bad) for t in (x, y))
    out = model(next(dirty), mask=mask)
    out.loss(next(dirty), mask).backward()
    assert all(torch.equal(p.grad, w) for p, w in zip(model.parameters(), want, strict=True))
    assert model(x, model(x[:, :1]).state).logits.isfinite().all()
