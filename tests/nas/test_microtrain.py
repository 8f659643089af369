"""Micro-training: honest scores, exact continuation, failures with reasons, no leak unseen."""

import json
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from kizzasi.cli import main
from kizzasi.errors import CheckpointError, DataError, SpecError
from kizzasi.models import BlockSpec, ModelSpec, Signal, Tokens, build_model, parameter_groups
from kizzasi.models.channels.mlp import MLPSpec
from kizzasi.models.mixer import MixerOut
from kizzasi.models.mixers.attention import Attention, AttentionSpec
from kizzasi.nas.evaluators.evaluator import Job
from kizzasi.nas.evaluators.micro_training import MicroTrain
from kizzasi.train.byte_baselines import baselines
from kizzasi.train.bytes import ByteText, load_corpus
from kizzasi.train.leak import find_leak
from kizzasi.train.muon import Muon
from kizzasi.train.recipe import Recipe
from kizzasi.train.trainer import Training
from kizzasi.train.windows import batches


@pytest.fixture(scope="module")
def corpus() -> ByteText:
    return load_corpus(max_bytes=60_000)


def small(vocab_size: int = 256, **changes) -> ModelSpec:
    block = BlockSpec(AttentionSpec(n_heads=2), MLPSpec())
    return ModelSpec(32, (block,), Tokens(vocab_size), dropout=0.0).replace(**changes)


def trained(evaluate, spec, tokens, seed, checkpoint=None):
    """One training by hand."""
    horizon = evaluate.recipe.horizon
    job = Job(spec, tokens, seed, horizon=horizon, checkpoint=checkpoint)
    return evaluate(job, lambda n: None)


RECIPE = Recipe(horizon=16_384, seq_len=64, batch_size=8, lr=1e-2)


def test_schedule_warms_up_then_falls_to_its_floor():
    recipe = Recipe(horizon=100 * 512, seq_len=64, batch_size=8, warmup=0.1, min_lr=0.2)
    factors = [recipe.factor(step) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[100] == pytest.approx(0.2)
    assert recipe.steps(1) == 1
    assert recipe.steps(512 * 7 + 511) == 7


def test_an_untrained_uniform_model_costs_eight_bits(corpus):
    model = build_model(small())
    with torch.no_grad():
        model.stem.lm_head.weight.zero_()
    assert Training(model, corpus, RECIPE).score() == pytest.approx(8.0, abs=1e-5)


def test_score_is_the_mean_over_every_held_out_byte(corpus):
    model = build_model(small(), seed=4)
    training = Training(model, corpus, RECIPE)
    held_out = corpus.valid.long()
    before = torch.cat([torch.zeros(1, dtype=torch.long), held_out[:-1]])
    nats = 0.0
    for start in range(0, len(held_out), 64):
        logits = model.eval()(before[None, start : start + 64]).logits[0].double()
        nats -= logits.log_softmax(-1).gather(1, held_out[start : start + 64, None]).sum().item()
    assert training.score() == pytest.approx(nats / len(held_out) / math.log(2), rel=1e-5)


def test_training_beats_the_unigram_on_held_out_bytes(corpus):
    measured = trained(MicroTrain(corpus, replace(RECIPE, horizon=65_536)), small(), 65_536, seed=0)
    assert measured.failure is None
    assert measured.spent == 65_536
    assert measured.score < baselines(corpus)["unigram"] - 0.5
    assert measured.curve[-1][1] < measured.curve[0][1]
    assert measured.per_second == pytest.approx(65_536 / measured.seconds)


@pytest.mark.parametrize(("dropout", "optimizer"), [(0.0, "adamw"), (0.1, "adamw"), (0.0, "muon")])
def test_rungs_continue_to_the_last_digit(corpus, tmp_path, dropout, optimizer):
    evaluate = MicroTrain(corpus, replace(RECIPE, optimizer=optimizer))
    spec = small(dropout=dropout)
    whole = trained(evaluate, spec, 16_384, seed=1)
    path = tmp_path / "trial.pt"
    torch.rand(7)  # the caller's own random stream plays no part
    first = trained(evaluate, spec, 6_144, seed=1, checkpoint=path)
    assert first.spent == 6_144
    second = trained(evaluate, spec, 16_384, seed=1, checkpoint=path)
    assert second.score == whole.score
    assert second.spent == whole.spent
    assert second.curve[-1] == whole.curve[-1]
    again = trained(evaluate, spec, 16_384, seed=1, checkpoint=path)
    assert again.score == whole.score
    assert again.per_second is None


def test_seeds_of_data_and_initialisation_are_apart(corpus):
    def run(data_seed, seed):
        training = Training(build_model(small(), seed=seed), corpus, RECIPE, data_seed)
        training.run(4_096)
        return training.score()

    assert run(0, 0) == run(0, 0)
    assert len({run(0, 0), run(1, 0), run(0, 1)}) == 3


def test_a_trial_draws_both_from_its_seed_and_windows_are_those_of_every_spec(corpus):
    evaluate = MicroTrain(corpus, RECIPE)
    first, again, other = (evaluate.training(Job(small(), 1, seed)) for seed in (0, 0, 1))
    assert (
        first.data_seed
        == again.data_seed
        == evaluate.training(Job(small(d_model=64), 1, 0)).data_seed
    )
    assert other.data_seed != first.data_seed
    embeddings = [next(training.model.stem.parameters()) for training in (first, again, other)]
    assert embeddings[0].equal(embeddings[1])
    assert not embeddings[0].equal(embeddings[2])


def test_divergence_and_nan_stop_with_their_reason(corpus):
    wild = replace(RECIPE, lr=1e6, warmup=0.0, clip=1e9)
    measured = trained(MicroTrain(corpus, wild), small(), 16_384, seed=0)
    assert measured.score is None
    assert "lower the lr" in measured.failure
    assert measured.spent < 16_384
    training = MicroTrain(corpus, RECIPE).training(Job(small(), 16_384, 0))
    with torch.no_grad():
        training.model.norm.weight.fill_(float("nan"))
    assert "became nan" in training.run(16_384)


def test_foreign_checkpoints_are_refused(corpus, tmp_path):
    evaluate = MicroTrain(corpus, RECIPE)
    trained(evaluate, small(), 2_048, seed=0, checkpoint=tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt: cannot continue"):
        trained(evaluate, small(d_model=64), 2_048, seed=0, checkpoint=tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    (first, *_) = saved["optimizer"]["state"]
    strangers = (
        [1, 2],
        {**saved, "optimizer": [3]},
        {**saved, "optimizer": {**saved["optimizer"], "state": {first + 10**6: {}}}},
        {**saved, "model": {**saved["model"], "extra": torch.zeros(1)}},
        {key: value for key, value in saved.items() if key != "losses"},
    )
    for stranger in strangers:
        torch.save(stranger, tmp_path / "b.pt")
        with pytest.raises(CheckpointError, match=r"b\.pt: cannot continue"):
            trained(evaluate, small(), 2_048, seed=0, checkpoint=tmp_path / "b.pt")
    (tmp_path / "b.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"b\.pt: cannot continue"):
        trained(evaluate, small(), 2_048, seed=0, checkpoint=tmp_path / "b.pt")
    (tmp_path / "a.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"a\.pt: cannot continue"):
        trained(evaluate, small(), 2_048, seed=0, checkpoint=tmp_path / "a.pt")


def test_data_that_does_not_fit_is_refused(corpus):
    with pytest.raises(DataError, match="vocab_size=64"):
        trained(MicroTrain(corpus, RECIPE), small(64), 2_048, seed=0)
    with pytest.raises(SpecError, match="needs a token stem"):
        Training(build_model(small(stem=Signal(1, 1))), corpus, RECIPE)
    with pytest.raises(SpecError, match="lr: 0 must be above 0"):
        trained(MicroTrain(corpus, replace(RECIPE, lr=0)), small(), 2_048, seed=0)


@dataclass(frozen=True)
class LeakySpec(AttentionSpec):
    """Not registered: attention whose parallel form sees the next token's input."""

    kind: ClassVar[str] = "leaky"

    def build(self, layer):
        return Leaky(self, layer)


class Leaky(Attention):
    def parallel(self, x, state, call):
        out = super().parallel(x, state, call)
        return MixerOut(out.y + 1e-3 * x.roll(-1, dims=1), out.state)


class Drifting(Attention):
    def recurrent(self, x, state, call):
        out = super().recurrent(x, state, call)
        return MixerOut(out.y * 1.001, out.state)


@dataclass(frozen=True)
class DriftingSpec(LeakySpec):
    def build(self, layer):
        return Drifting(self, layer)


def test_a_leak_is_found_before_any_score(corpus):
    leaky = small(blocks=(BlockSpec(LeakySpec(n_heads=2)),))
    measured = trained(MicroTrain(corpus, RECIPE), leaky, 2_048, seed=0)
    assert measured.score is None
    assert measured.spent == 0
    assert "leaks the future" in measured.failure
    drifting = build_model(small(blocks=(BlockSpec(DriftingSpec(n_heads=2)),)))
    assert "recurrent form differs" in find_leak(drifting)


def test_honest_models_pass_the_gate():
    model = build_model(small())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert find_leak(model) is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert find_leak(build_model(small(stem=Signal(2, 3)))) is None


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("clip", [1e-2, 1e9])
def test_a_training_is_the_recipe_to_the_letter(corpus, optimizer, clip):
    """Three steps by hand: batches, schedule, clipping, decay, betas."""
    recipe = replace(RECIPE, optimizer=optimizer, clip=clip, lr=3e-3, weight_decay=0.3)
    training = Training(build_model(small(), seed=2), corpus, recipe, data_seed=9)
    training.run(3 * recipe.tokens_per_step)
    model = build_model(small(), seed=2).train()
    groups = parameter_groups(model, recipe.lr, 0.3, optimizer=optimizer)
    kind = {"adamw": torch.optim.AdamW, "muon": Muon}[optimizer]
    by_hand = kind(groups, betas=(0.9, 0.95))
    stream = batches(corpus.train, 64, 8, 9)
    for step in range(3):
        for group in by_hand.param_groups:
            group["lr"] = recipe.lr * recipe.factor(step)
        inputs, targets = next(stream)
        by_hand.zero_grad()
        model(inputs).loss(targets).backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.grad.mul_(min(1.0, clip / (norm.item() + 1e-6)))
        by_hand.step()
    for mine, theirs in zip(model.parameters(), training.model.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6, rtol=1e-5)


def test_muon_learns_and_its_matrices_may_have_a_rate_of_their_own(corpus):
    def scored(**changes):
        recipe = replace(RECIPE, horizon=8_192, **changes)
        return trained(MicroTrain(corpus, recipe), small(), 8_192, 0).score

    assert scored(optimizer="muon") < 6.0
    assert scored(optimizer="muon", matrix_lr=1e-4) != scored(optimizer="muon")
    with pytest.raises(SpecError, match="matrix_lr: only Muon"):
        scored(matrix_lr=1e-4)


def edge_leak(start: int):
    """Attention that sees the next input from a position on: a leak that begins late."""

    class Late(Attention):
        def forward(self, x, state=None, **call):
            out = super().forward(x, state, **call)
            ahead = 1e-3 * x.roll(-1, dims=1)
            ahead[:, :start] = 0
            return MixerOut(out.y + ahead, out.state)

    @dataclass(frozen=True)
    class LateSpec(AttentionSpec):
        kind: ClassVar[str] = "late"

        def build(self, layer):
            return Late(self, layer)

    return LateSpec


@pytest.mark.parametrize(
    ("start", "seq_len", "window"), [(64, 0, None), (100, 128, None), (140, 0, 80)]
)
def test_a_leak_that_begins_late_is_found(start, seq_len, window):
    """Beyond the chunk of a scan, within the training length, beyond two windows."""
    spec = small(blocks=(BlockSpec(edge_leak(start)(n_heads=2, window=window)),))
    assert "leaks the future" in (find_leak(build_model(spec), seq_len) or "")


def test_a_leak_in_training_mode_alone_is_found():
    class Trained(Attention):
        def forward(self, x, state=None, **call):
            out = super().forward(x, state, **call)
            ahead = 1e-3 * x.roll(-1, dims=1) if self.training else 0
            return MixerOut(out.y + ahead, out.state)

    @dataclass(frozen=True)
    class TrainedSpec(AttentionSpec):
        kind: ClassVar[str] = "trained"

        def build(self, layer):
            return Trained(self, layer)

    spec = small(blocks=(BlockSpec(TrainedSpec(n_heads=2)),), dropout=0.1)
    assert "leaks the future" in (find_leak(build_model(spec)) or "")


def block_summary(size: int):
    """The summary of a whole block is added inside that block."""

    def model(x):
        n = -(-x.shape[1] // size) * size - x.shape[1]
        blocks = torch.nn.functional.pad(x, (0, 0, 0, n)).unflatten(1, (-1, size))
        return x + blocks.mean(2, keepdim=True).expand_as(blocks).flatten(1, 2)[:, : x.shape[1]]

    return model


def circular_filter(x):
    """A spectral filter without padding: the end of the sequence reaches its beginning."""
    taps = torch.zeros(x.shape[1], dtype=x.dtype)
    taps[:4] = 0.25
    spectrum = torch.fft.rfft(x, dim=1) * torch.fft.rfft(taps)[:, None]
    return torch.fft.irfft(spectrum, n=x.shape[1], dim=1)


FAULTS = {"block_64": block_summary(64), "block_16": block_summary(16), "filter": circular_filter}


class Faulty(Attention):
    def forward(self, x, state=None, **call):
        out = super().forward(x, state, **call)
        return MixerOut(FAULTS[self.spec.fault](out.y), out.state)


@dataclass(frozen=True)
class FaultySpec(AttentionSpec):
    kind: ClassVar[str] = "faulty"
    fault: str = ""

    def build(self, layer):
        model = Faulty(self, layer)
        model.spec = self
        return model


@pytest.mark.parametrize("fault", FAULTS)
def test_leaks_that_fooled_people_are_caught(fault, corpus, tmp_path, capsys, monkeypatch):
    """By a function alone, in a mixer, before a training, and in a checkpoint."""
    inputs = torch.randn(2, 129, 3, generator=torch.Generator().manual_seed(0)).double()
    assert "leaks the future" in (find_leak(FAULTS[fault], inputs=inputs) or "")
    assert find_leak(lambda x: x.cumsum(1), inputs=inputs) is None
    spec = small(blocks=(BlockSpec(FaultySpec(n_heads=2, fault=fault)),))
    measured = trained(MicroTrain(corpus, RECIPE), spec, 2_048, seed=0)
    assert (measured.score, "leaks the future" in measured.failure) == (None, True)
    monkeypatch.setitem(FaultySpec.registry, "faulty", FaultySpec)
    build_model(spec).save_pretrained(tmp_path / "model")
    assert main(["info", str(tmp_path / "model"), "--leak", "--json"]) == 0
    assert "leaks the future" in json.loads(capsys.readouterr().out)["leak"]
