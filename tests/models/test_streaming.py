"""Signals: the streaming face equals the parallel form, forgets on reset, knows its window."""

import math

import pytest
import torch

from kizzasi.errors import ShapeError, SpecError
from kizzasi.models import BlockSpec, ModelSpec, Signal, SignalPredictor, Tokens, build_model
from kizzasi.models.channels.mlp import MLPSpec
from kizzasi.models.channels.rwkv_channel import RWKVChannelSpec
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
