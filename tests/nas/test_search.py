"""The main job, small: it runs, resumes to the same result, and refuses bad input."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_search import SPACE, config, outcome, write_text

from kizzasi.errors import SpecError, StudyError
from kizzasi.models import load
from kizzasi.nas.search import named_search
from kizzasi.nas.spaces.families import FAMILIES, model_spec
from kizzasi.nas.study.journal import read_events
from kizzasi.train.bytes import load_corpus
from kizzasi.train.recipe import Recipe
from kizzasi.train.trainer import Training


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    named_search(config(data), folder, SPACE)
    return folder


def test_a_search_leaves_a_report_and_a_runnable_winner(finished):
    events = [e for e in read_events(finished / "journal.jsonl") if e["event"] != "sample"]
    assert events[-1]["event"] == "result"
    groups = {e["group"] for e in events if e["event"] == "candidate"}
    assert groups == {"preset", "proxy", "random", "outside"}
    assert "bits/byte" in (finished / "report.md").read_text()
    assert "<svg" in (finished / "report.html").read_text()
    assert list((finished / "trials").iterdir()) == []
    model = load(finished / "best")
    winner = next(e for e in events if e.get("id") == events[-1]["winner"])
    assert model.spec.to_dict() == winner["spec"]
    final = next(e for e in events if e.get("id") == events[-1]["winner_trials"][0])
    corpus = load_corpus(events[0]["config"]["data"])
    recipe = Recipe(1536, seq_len=32, batch_size=4)
    assert Training(model, corpus, recipe).score() == pytest.approx(final["score"])
    assert model.generate(torch.tensor([108]), 5).shape == (6,)


def test_candidates_keep_to_the_band_and_rungs_to_their_budgets(finished):
    events = read_events(finished / "journal.jsonl")
    candidates = {e["id"]: e for e in events if e["event"] == "candidate"}
    for e in candidates.values():
        inside = 0.6 * 22_000 <= e["params"] <= 1.4 * 22_000
        assert inside == (e["group"] != "outside")
    budgets = {"0": 512, "1": 1024, "final": 1536, "test": 1536}
    for e in events:
        if e["event"] == "trial":
            assert e["failure"] is None
            assert e["tokens"] == budgets[e["rung"]]
            assert e["rung"] == "0" or candidates[e["candidate"]]["group"] != "outside"


def test_a_finished_search_resumes_to_itself(finished, data):
    before = outcome(finished)
    named_search(config(data), finished, SPACE, resume=True)
    assert outcome(finished) == before


def test_processes_give_the_result_of_one_process(finished, data, tmp_path):
    named_search(config(data), tmp_path / "run", SPACE, workers=2, threads=1)
    assert outcome(tmp_path / "run") == outcome(finished)


def test_runs_are_not_overwritten_or_mixed(finished, data):
    with pytest.raises(StudyError, match="holds a run already; use --resume"):
        named_search(config(data), finished, SPACE)
    other = replace(config(data), seed=1)
    with pytest.raises(StudyError, match="cannot resume another search; seed: 0 then, 1 now"):
        named_search(other, finished, SPACE, resume=True)
    longer = replace(config(data), rungs=(*config(data).rungs, 10**6))
    with pytest.raises(StudyError, match=f"rungs: .* found here, by --warm {finished}$"):
        named_search(longer, finished, SPACE, resume=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"n_params": 50}, SpecError, "n_params: 50 is too few"),
        ({"band": 1e-9}, StudyError, "change --params or widen --band"),
        ({"rungs": (100, 50)}, SpecError, "rungs: .* rising"),
        ({"keep": 2.0}, SpecError, "keep: 2.0 is outside"),
        ({"lrs": ()}, SpecError, "lrs"),
        ({"n_best": 0}, SpecError, "n_best: 0 is not positive"),
    ],
)
def test_bad_settings_are_named(data, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        named_search(replace(config(data), **changes), tmp_path / "run", SPACE)


def test_a_full_disk_ends_the_search_and_loses_nothing(data, tmp_path, monkeypatch):
    calls = []

    def save(self, path):
        calls.append(path)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, path)

    real = Training.save
    monkeypatch.setattr(Training, "save", save)
    with pytest.raises(StudyError, match=r"trials: No space left on device; make room"):
        named_search(config(data), tmp_path / "run", SPACE)
    trials = [e for e in read_events(tmp_path / "run" / "journal.jsonl") if e["event"] == "trial"]
    assert len(trials) == 3
    monkeypatch.setattr(Training, "save", real)
    named_search(config(data), tmp_path / "run", SPACE, resume=True)
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()


@pytest.mark.parametrize("family", [*FAMILIES, "rwkv+transformer"])
def test_no_gene_is_dead(family):
    """Every gene of a candidate changes the model that is built."""
    genes = {"d_model": 32, "d_state": 8, "n_layers": 2, "expand_factor": 2.0, "dropout": 0.0}
    other = {"d_model": 64, "d_state": 16, "n_layers": 4, "expand_factor": 4.0, "dropout": 0.1}
    spec = model_spec(family, vocab_size=256, **genes)
    for gene, value in other.items():
        changed = model_spec(family, vocab_size=256, **{**genes, gene: value})
        assert changed.digest != spec.digest, gene
        if gene not in ("dropout", "d_state"):
            assert changed.cost(1).params != spec.cost(1).params, gene


def test_genes_that_do_not_fit_are_refused():
    with pytest.raises(SpecError, match="did you mean mamba"):
        model_spec(
            "mamab", vocab_size=9, d_model=8, d_state=8, n_layers=1, expand_factor=1, dropout=0
        )
    with pytest.raises(SpecError, match="does not divide d_model"):
        model_spec(
            "transformer",
            vocab_size=9,
            d_model=8,
            d_state=3,
            n_layers=1,
            expand_factor=1,
            dropout=0,
        )
