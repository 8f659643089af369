"""Signals: the streaming face equals the parallel form, forgets on reset, knows its window."""

import math

import pytest
import torch

from kizzasi.errors import GenerateError, ShapeError, SpecError
from kizzasi.models import BlockSpec, ModelSpec, Signal, SignalPredictor, Tokens, build_model
from kizzasi.models.channels.mlp import MLPSpec
from kizzasi.models.channels.rwkv_channel import RWKVChannelSpec
from kizzasi.models.heads import Regression
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.mixers.mamba import MambaSpec


def signal_model(*blocks: BlockSpec):
    return build_model(ModelSpec(16, blocks, Signal(3, 2)), dtype=torch.float64)


def test_stream_equals_parallel_form_and_reset_forgets():
    model = signal_model(BlockSpec(MambaSpec()), BlockSpec(AttentionSpec(n_heads=2), MLPSpec()))
    frames = torch.randn(9, 3, dtype=torch.float64)
    expected = model(frames[None]).logits[0]
    predictor = SignalPredictor(model)
    for _ in range(2):
        streamed = torch.stack([predictor.step(frame) for frame in frames])
        torch.testing.assert_close(streamed, expected, rtol=1e-9, atol=1e-10)
        predictor.reset()
    batch = SignalPredictor(model, batch_size=4)
    assert batch.step(frames[:4]).shape == (4, 2)


def test_context_window_is_what_outputs_depend_on():
    window = BlockSpec(AttentionSpec(n_heads=2, window=4), MLPSpec())
    model = signal_model(window, window)
    n = SignalPredictor(model).context_window
    assert n == 7
    frames = torch.randn(1, 12, 3, dtype=torch.float64)
    last = model(frames).logits[:, -1]
    torch.testing.assert_close(model(frames[:, -7:]).logits[:, -1], last, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(model(frames[:, -6:]).logits[:, -1], last)
    assert SignalPredictor(signal_model(BlockSpec(MambaSpec()))).context_window == math.inf
    shifted = BlockSpec(AttentionSpec(n_heads=2, window=1), RWKVChannelSpec())
    assert signal_model(shifted).spec.context_window == 2


def test_wrong_models_and_frames_are_refused():
    tokens = build_model(ModelSpec(16, (BlockSpec(MambaSpec()),), Tokens(5)))
    with pytest.raises(SpecError, match="signal stem"):
        SignalPredictor(tokens)
    predictor = SignalPredictor(signal_model(BlockSpec(MambaSpec())))
    with pytest.raises(ShapeError, match=r"expected frames \(b, 3\)"):
        predictor.step(torch.zeros(4))
    with pytest.raises(ShapeError, match="made for a batch of 1"):
        predictor.step(torch.zeros(2, 3))


def feedback(frames, n, model):
    """Frames read whole again and again by the parallel form, each prediction appended."""
    for _ in range(n):
        frames = torch.cat([frames, model(frames).logits[:, -1:]], 1)
    return frames[:, -n:].detach()


def test_a_forecast_reads_its_own_predictions():
    spec = ModelSpec(
        16, (BlockSpec(MambaSpec()), BlockSpec(AttentionSpec(n_heads=2), MLPSpec())), Signal(3, 3)
    )
    model = build_model(spec, dtype=torch.float64).train()
    model.blocks[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    frames = torch.randn(2, 9, 3, dtype=torch.float64)
    expected = feedback(frames, 5, model)
    made = model.forecast(frames, 5)
    torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(model.forecast(frames[1], 5), made[1], rtol=1e-9, atol=1e-10)
    after = model(frames[:, :6]).state
    later = model.forecast(frames[:, 6:], 5, state=after)
    torch.testing.assert_close(later, made, rtol=1e-9, atol=1e-10)
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    padded = model.forecast(frames, 5, mask=mask)
    alone = model.forecast(frames[1, 4:], 5)
    torch.testing.assert_close(padded[1], alone, rtol=1e-9, atol=1e-10)
    predictor = SignalPredictor(model, batch_size=2)
    read = predictor.read(frames[:, :8])
    torch.testing.assert_close(read, model(frames[:, :8]).logits, rtol=1e-9, atol=1e-10)
    predictor.step(frames[:, 8])
    for _ in range(2):  # it stays where it is
        torch.testing.assert_close(predictor.forecast(5), made, rtol=1e-9, atol=1e-10)
    assert before == {name: module.training for name, module in model.named_modules()}
    model(made).loss(made).backward()  # forecasts can be trained on


def test_what_cannot_be_forecast_is_said():
    block = BlockSpec(MambaSpec())
    frames = torch.zeros(1, 4, 3, dtype=torch.float64)
    with pytest.raises(GenerateError, match="n_out = 2 channels and the model reads n_in = 3"):
        signal_model(block).forecast(frames, 2)
    tokens = build_model(ModelSpec(16, (block,), Tokens(5)))
    with pytest.raises(GenerateError, match=r"model\.generate continues them"):
        tokens.forecast(torch.tensor([[1, 2]]), 2)
    model = build_model(ModelSpec(16, (block,), Signal(3, 3)), dtype=torch.float64)
    with pytest.raises(GenerateError, match="n: must be an integer from 1 on, not 0"):
        model.forecast(frames, 0)
    with pytest.raises(ShapeError, match=r"got list; try torch\.as_tensor"):
        model.forecast([[0.0, 0.0, 0.0]], 2)
    with pytest.raises(GenerateError, match="call step or read first"):
        SignalPredictor(model).forecast(2)
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with pytest.raises(GenerateError, match="row 0: a predicted frame is NaN"):
        model.forecast(frames, 2)


def test_a_model_whose_first_head_is_another_is_not_fed_with_it():
    spec = ModelSpec(16, (BlockSpec(MambaSpec()),), Signal(3, 3), heads=(Regression(n_out=3),))
    with pytest.raises(SpecError, match="forecast needs the stem's own head"):
        build_model(spec).forecast(torch.zeros(1, 4, 3), 2)


def test_signal_training_lowers_the_squared_error():
    model = signal_model(BlockSpec(MambaSpec())).float()
    t = torch.arange(65.0)
    frames = torch.stack([torch.sin(t / 3), torch.cos(t / 5), torch.ones(65)], -1)[None]
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-2))
    losses = []
    for _ in range(30):
        loss = model(frames[:, :-1]).loss(frames[:, 1:, :2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
