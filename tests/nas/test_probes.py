"""Probes: they measure learning, on other examples than they train on, for any spec."""

from dataclasses import replace

import pytest
import torch

from kizzasi.models import BlockSpec, ModelSpec, Signal, Tokens
from kizzasi.models.channels import MLPSpec
from kizzasi.models.mixers import AttentionSpec, MambaSpec
from kizzasi.nas.evaluators.probes import N_HELD_OUT, PROBES, Probe
from kizzasi.train.seeds import derive_seed
from kizzasi.train.synthetic import Parity, SelectiveCopying

MAMBA = ModelSpec(16, (BlockSpec(MambaSpec(d_state=8)),), Tokens(256))
QUICK = Probe(SelectiveCopying(vocab_size=6, seq_len=6, n_tokens=1), steps=120)


def test_a_model_that_can_do_it_learns_it():
    result = QUICK(MAMBA)
    assert result.failure is None
    assert result.steps == 120
    assert result.chance == 1 / 4
    assert result.accuracy is not None
    assert result.accuracy > 0.9


def test_a_model_without_memory_stays_at_chance():
    memoryless = BlockSpec(AttentionSpec(n_heads=2, window=1), MLPSpec())
    result = QUICK(MAMBA.replace(blocks=(memoryless,)))
    assert result.accuracy == pytest.approx(1 / 4, abs=0.1)


def test_untrained_accuracy_counts_scored_positions_only(monkeypatch):
    """Answers of a constant model against a count by hand."""
    probe = Probe(Parity(seq_len=8, min_len=3), steps=1)
    monkeypatch.setattr("kizzasi.nas.evaluators.probes.build_model", constant_model)
    targets = probe.task.sample(N_HELD_OUT, derive_seed(0, "held out", "valid")).targets[:, 2:]
    assert probe(MAMBA.replace(norm="layer")).accuracy == pytest.approx(
        (targets == 1).double().mean().item()
    )


def constant_model(spec, **settings):
    """Always answers 1: nothing reaches the head but a bias."""
    from kizzasi.models import build_model

    model = build_model(spec, **settings)
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.fill_(1.0)
        model.stem.lm_head.weight[0] = -1.0
        model.stem.lm_head.weight[1] = 1.0
    return model


def test_equal_seeds_give_equal_results():
    short = replace(QUICK, steps=3)
    first, again, other = short(MAMBA, 1), short(MAMBA, 1), short(MAMBA, 2)
    assert first.accuracy == again.accuracy
    assert first.accuracy != other.accuracy
    assert set(first.to_dict()) == {"accuracy", "chance", "steps", "seconds", "failure"}


@pytest.mark.parametrize("name", PROBES)
def test_held_out_examples_are_not_trained_on(name):
    probe = PROBES[name]
    seeds = [derive_seed(derive_seed(0, "probe"), "train", step) for step in range(probe.steps)]
    trained = torch.cat([probe.task.sample(probe.batch_size, seed).inputs for seed in seeds])
    held_out = probe.task.sample(N_HELD_OUT, derive_seed(0, "held out", "valid")).inputs
    seen = {tuple(row) for row in trained.tolist()}
    assert sum(tuple(row) in seen for row in held_out.tolist()) <= 0.01 * N_HELD_OUT


@pytest.mark.parametrize("stem", [Tokens(7, max_positions=4), Tokens(999), Signal(2, 3)])
def test_any_stem_is_replaced(stem):
    spec = QUICK.spec_for(MAMBA.replace(stem=stem))
    positions = 6 if stem == Tokens(7, max_positions=4) else None
    assert spec.stem == Tokens(6, max_positions=positions)
    assert spec.blocks == MAMBA.blocks
    assert replace(QUICK, steps=2)(MAMBA.replace(stem=stem)).accuracy is not None


def test_a_leak_fails_before_training():
    seeing = BlockSpec(AttentionSpec(n_heads=2, causal=False))
    result = QUICK(MAMBA.replace(blocks=(seeing,)))
    assert result.accuracy is None
    assert result.steps == 0
    assert "later inputs" in (result.failure or "")


def test_a_lost_training_says_so():
    result = replace(QUICK, lr=1e30)(MAMBA)
    assert result.accuracy is None
    assert "lower the lr" in (result.failure or "")
