"""Options of a recipe: each gives the training that it names, and goes on where it was."""

from dataclasses import replace

import pytest
import torch

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.mixers import AttentionSpec
from kizzasi.train import Recipe, Training
from kizzasi.train.bytes import load_corpus

SPEC = ModelSpec(16, (BlockSpec(AttentionSpec(2)),), Tokens(256))
RECIPE = Recipe(512, seq_len=16, batch_size=4, lr=1e-2, score_windows=8)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text"
    path.write_bytes(b"".join(b"%d of a small text\n" % (i % 9) for i in range(200)))
    return load_corpus(path)


def trained(corpus, tokens: int = 512, **options) -> Training:
    training = Training(build_model(SPEC), corpus, replace(RECIPE, **options))
    assert training.run(tokens) is None
    return training


def weights(training: Training) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in training.model.parameters()])


@pytest.mark.parametrize("options", [{"accumulate": 4}, {"fused": True}, {"precision": "fp32"}])
def test_what_only_computes_otherwise_gives_the_same_training(corpus, options):
    usual = trained(corpus)
    other = trained(corpus, **options)
    torch.testing.assert_close(weights(other), weights(usual), rtol=1e-4, atol=1e-5)
    assert other.score() == pytest.approx(usual.score(), rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_scales_its_losses_and_goes_on(corpus, tmp_path, precision):
    usual, half = trained(corpus), trained(corpus, precision=precision)
    assert half.score() == pytest.approx(usual.score(), rel=0.05)
    assert half.score() != usual.score()
    assert half.scaler.is_enabled() == (precision == "fp16")
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    first = trained(corpus, 256, precision=precision)
    first.save(tmp_path / "half.pt")
    again = Training(build_model(SPEC, seed=1), corpus, replace(RECIPE, precision=precision))
    again.restore(tmp_path / "half.pt")
    assert again.scaler.state_dict() == first.scaler.state_dict()
    again.run(512)
    assert torch.equal(weights(again), weights(half))


def test_an_overflowing_half_step_is_skipped_and_the_scale_falls(corpus):
    training = Training(build_model(SPEC), corpus, replace(RECIPE, precision="fp16"))
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before, scale = weights(training), 2.0**40
    training.run(64)
    assert torch.equal(weights(training), before)
    assert training.scaler.get_scale() < scale


def test_compiled_is_what_is_trained_and_not_what_is_saved(corpus, monkeypatch):
    calls = []

    def compiled(model):
        return lambda inputs: calls.append(inputs.shape) or model(inputs)

    monkeypatch.setattr(torch, "compile", compiled)
    training = trained(corpus, 128, compile=True)
    assert calls == [(4, 16)] * 2
    assert torch.equal(weights(training), weights(trained(corpus, 128)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "precision: 'fp8' unknown"),
        ({"accumulate": 3}, "accumulate: 3 does not divide the 4 windows"),
        ({"accumulate": 0}, "accumulate: 0"),
        ({"fused": True, "optimizer": "muon"}, "fused: muon has no fused form"),
    ],
)
def test_options_that_mean_nothing_are_named(options, message):
    with pytest.raises(SpecError, match=message):
        replace(RECIPE, **options).check()
