"""What a model is given: every integer dtype of ids, any float of frames; the rest is named."""

import pytest
import torch

from kizzasi.errors import ShapeError, SpecError
from kizzasi.models import BlockSpec, ModelSpec, Signal, Tokens, build_model, load
from kizzasi.models.mixers.mamba import MambaSpec
from kizzasi.models.ops.devices import usable_device

BLOCKS = (BlockSpec(MambaSpec(d_state=4)),)
BYTES, SIGNAL = ModelSpec(8, BLOCKS, Tokens(200)), ModelSpec(8, BLOCKS, Signal(3, 2))


@pytest.fixture(scope="module")
def model():
    return build_model(BYTES)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32]
)
def test_ids_of_every_integer_dtype(model, dtype):
    ids = torch.tensor([[3, 100, 127]])
    out, want = model(ids.to(dtype)), model(ids)
    assert torch.equal(out.logits, want.logits)
    assert torch.equal(out.loss(ids.to(dtype)), want.loss(ids))
    step = model.step(ids[:, 0].to(dtype), want.state)
    assert torch.equal(step.logits, model.step(ids[:, 0], want.state).logits)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.tensor([[200]]), r"id 200 is outside the vocabulary of 200 \(0 to 199\)"),
        (torch.tensor([[4, -1]]), "id -1 is outside the vocabulary"),
        (torch.tensor([[255]], dtype=torch.uint8), "id 255 is outside the vocabulary"),
        (torch.tensor([[True]]), r"ids \(b, t\) of an integer dtype, got \(1, 1\) torch.bool"),
        (torch.tensor([[1.0]]), "integer dtype"),
        (torch.tensor([1]), r"\(b, t\) .* got \(1,\)"),
        (torch.zeros(2, 0).long(), "integer dtype"),
        ([[1, 2]], r"\[\[1, 2\]\] of type list; convert it by torch.tensor"),
        ("text", "'text' of type str; encode it first"),
        (b"text", "of type bytes; encode it first"),
    ],
)
def test_ids_that_do_not_fit_are_named(model, inputs, message):
    with pytest.raises(ShapeError, match=message):
        model(inputs)


def test_a_step_is_told_of_its_ids_too(model):
    state = model.init_state(1)
    for inputs, message in ((torch.tensor([777]), "id 777"), ([3], "of type list")):
        with pytest.raises(ShapeError, match=message):
            model.step(inputs, state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_frames_of_every_float(dtype, model_dtype):
    model = build_model(SIGNAL, dtype=model_dtype)
    frames = torch.tensor([[[0.5, 1.0, -2.0], [0.0, 0.25, 4.0]]])  # exact in all
    out, want = model(frames.to(dtype)), model(frames.to(model_dtype))
    assert out.logits.dtype == model_dtype
    assert torch.equal(out.logits, want.logits)
    again = model.step(frames[:, 0].to(dtype), want.state).logits
    assert torch.equal(again, model.step(frames[:, 0].to(model_dtype), want.state).logits)


def test_frames_that_do_not_fit_are_named():
    model = build_model(SIGNAL)
    for inputs, message in (
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"convert them by .float\(\)"),
        (torch.zeros(1, 2, 4), r"expected frames \(b, t, 3\) .* got \(1, 2, 4\)"),
        ([[[1.0, 2.0, 3.0]]], "of type list; convert it by torch.tensor"),
    ):
        with pytest.raises(ShapeError, match=message):
            model(inputs)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "xla", 3.5])
def test_devices_that_are_not_there(tmp_path, device):
    build_model(BYTES).save_pretrained(tmp_path / "model")
    message = rf"device: {device!r} cannot be used here \(.*\); use .*\"cpu\""
    for use in (
        lambda: usable_device(device),
        lambda: build_model(BYTES, device=device),
        lambda: load(tmp_path / "model", device=device),
    ):
        with pytest.raises(SpecError, match=message):
            use()


def test_devices_that_are():
    assert usable_device(None) == usable_device("cpu") == torch.device("cpu")
    assert usable_device("meta").type == "meta"
