"""The end of a search: finalists and their twins, killed anywhere, to the last digit."""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from small_search import killed_after, outcome, write_text

from kizzasi.cli.search import add_arguments
from kizzasi.errors import SpecError
from kizzasi.models import ModelSpec, load, presets
from kizzasi.nas.evaluators.micro_training import MicroTrain
from kizzasi.nas.report.pages import conclusions, summarise
from kizzasi.nas.results.equal_terms import result_figures
from kizzasi.nas.results.noise import noise_of
from kizzasi.nas.search import SearchConfig, named_search
from kizzasi.nas.spaces.families import ArchSearchSpace
from kizzasi.nas.study.journal import Journal, read_events

SPACE = ArchSearchSpace(
    d_model_options=(32, 48),
    d_state_options=(8, 16),
    n_layers_options=(1,),
    model_types=("transformer",),
    expand_factor_options=(1.0, 2.0),
    dropout_options=(0.0,),
)
CONFIG = SearchConfig(
    space="families",
    searcher="random",
    scheduler="halving",
    n_params=16_000,
    band=0.5,
    n_pool=3,
    proxies=(),
    rungs=(64, 128),
    lrs=(4e-3,),
    n_finalists=2,
    final_tokens=384,
    final_seeds=3,
    slope_seeds=2,
    seq_len=16,
    batch_size=2,
    score_windows=8,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    named_search(replace(CONFIG, data=data), folder, SPACE)
    return folder


def events_of(folder: Path, kind: str) -> list[dict]:
    return [e for e in read_events(folder / "journal.jsonl") if e["event"] == kind]


def test_every_finalist_is_trained_at_half_of_its_size(finished):
    (result,) = events_of(finished, "result")
    candidates = {e["id"]: e for e in events_of(finished, "candidate")}
    trials = {e["id"]: e for e in events_of(finished, "trial")}
    own = [final["candidate"] for final in result["finalists"]]
    twins = events_of(finished, "narrow")
    assert [e["candidate"] for e in twins] == own
    assert len(own) == 3  # two searched ones and a preset
    for e in twins:
        full, spec = candidates[e["candidate"]], ModelSpec.from_dict(e["spec"])
        assert e["params"] == spec.cost(1).params
        assert 0.35 <= e["params"] / full["params"] <= 0.71
        assert len(spec.blocks) == len(full["spec"]["blocks"])
        finals = [t for t in trials.values() if t["rung"] == "final"]
        for t, seed in zip((trials[name] for name in e["trials"]), (1, 2), strict=True):
            (match,) = [f for f in finals if (f["candidate"], f["seed"]) == (full["id"], seed)]
            assert (t["rung"], t["seed"], t["candidate"]) == ("narrow", seed, full["id"])
            assert t["settings"] == match["settings"] == {"lr": 4e-3}
            assert t["tokens"] == match["tokens"] == 384
            assert t["score"] > 0


def test_the_result_says_what_the_trials_say(finished):
    (result,) = events_of(finished, "result")
    summary = summarise(read_events(finished / "journal.jsonl"))
    size = summary.preset.entry["params"]
    figures = result_figures(summary.finals, summary.sized, size, 1)
    for kind in ("equal_params", "slopes", "double_size"):
        mine, told = result[kind], figures[kind]
        assert mine["noise"] == {**told["noise"], "seeds": [1, 2]}
        by_name = [sorted(x["finalists"], key=lambda f: f["candidate"]) for x in (mine, told)]
        assert by_name[0] == by_name[1]
    assert result["slopes"]["noise"]["floor"] == noise_of([p.slope for p in summary.sized]).floor
    finals = {f.entry["id"]: f.on_valid.by_seed for f in summary.finals}
    doubled = {f["candidate"]: f["mean"] for f in result["double_size"]["finalists"]}
    for f in result["slopes"]["finalists"]:
        own = finals[f["candidate"]]
        assert doubled[f["candidate"]] == pytest.approx((own[1] + own[2]) / 2 + f["mean"])
    assert "gains most from size" in " ".join(conclusions(summary))
    assert "rung narrow" not in " ".join(rung.name for rung in summary.rungs)


def test_a_search_killed_between_twins_ends_as_the_whole_one(finished, data, tmp_path):
    whole = read_events(finished / "journal.jsonl")
    first = next(i for i, e in enumerate(whole) if e["event"] == "narrow")
    folder = tmp_path / "run"
    for stop in (first - 2, first + 2, first + 5, len(whole) - 1):
        known = len(read_events(folder / "journal.jsonl")) if folder.exists() else 0
        with killed_after(stop - known):
            named_search(replace(CONFIG, data=data), folder, SPACE, resume=True)
    named_search(replace(CONFIG, data=data), folder, SPACE, resume=True)
    assert outcome(folder) == outcome(finished)
    assert list((folder / "trials").iterdir()) == []
    before = outcome(folder)
    named_search(replace(CONFIG, data=data), folder, SPACE, resume=True)
    assert outcome(folder) == before


def test_a_journal_from_before_goes_on_to_a_report(finished, data, tmp_path):
    """Without the option, the twins, and the figures of the result."""
    later = ("equal_params", "slopes", "double_size")
    with Journal(tmp_path / "run" / "journal.jsonl") as journal:
        for e in read_events(finished / "journal.jsonl"):
            if e["event"] == "study":
                config = {k: v for k, v in e["config"].items() if k != "slope_seeds"}
                e = {**e, "config": config}
            if "narrow" not in (e["event"], e.get("rung")):
                journal.append({k: v for k, v in e.items() if k not in later})
    before = outcome(tmp_path / "run")
    shutil.copytree(finished / "best", tmp_path / "run" / "best")
    named_search(replace(CONFIG, data=data, slope_seeds=0), tmp_path / "run", SPACE, resume=True)
    assert outcome(tmp_path / "run") == before
    text = (tmp_path / "run" / "report.md").read_text()
    assert "Finalists, time-matched" in text
    assert "--slope-seeds does that" in text


def test_a_winner_whose_last_rung_was_its_final_training_is_saved(data, tmp_path):
    """Then its checkpoint is gone."""
    config = replace(CONFIG, data=data, final_tokens=128, final_seeds=2, slope_seeds=0)
    named_search(config, tmp_path / "run", SPACE)
    events = read_events(tmp_path / "run" / "journal.jsonl")
    result, summary = events[-1], summarise(events)
    assert {e["rung"] for e in events if e["event"] == "trial"} == {"0", "1", "final", "test"}
    assert (result["slopes"], result["double_size"]) == (None, None)
    assert not events_of(tmp_path / "run", "narrow")
    means = {f["candidate"]: (f["mean"], f["spread"]) for f in result["finalists"]}
    assert {f.entry["id"]: (f.mean, f.spread) for f in summary.finals} == means
    assert summary.noise.seeds == (1, 2)
    saved = load(tmp_path / "run" / "best")
    shutil.rmtree(tmp_path / "run" / "best")
    named_search(config, tmp_path / "run", SPACE, resume=True)
    again = load(tmp_path / "run" / "best")
    assert again.spec.to_dict() == saved.spec.to_dict()
    for name, value in saved.state_dict().items():
        assert value.equal(again.state_dict()[name])


def test_when_all_finalists_fail_the_next_best_are_trained(data, tmp_path, monkeypatch):
    """A final training may diverge where the rungs, which stop earlier, did not."""
    config = replace(CONFIG, data=data, n_finalists=1, slope_seeds=0, final_seeds=1)
    train, failed = MicroTrain.__call__, []

    def fail_at_first(self, job, report):
        measured = train(self, job, report)
        if job.budget < 384 or failed or job.spec == preset_spec:
            return measured
        failed.append(job.spec)
        return replace(measured, score=None, failure="diverged")

    preset_spec = presets.at_size("transformer", config.n_params, vocab_size=256)
    monkeypatch.setattr(MicroTrain, "__call__", fail_at_first)
    result = named_search(config, tmp_path / "run", SPACE, executor="in-process").summary.result
    first, preset, second = result["finalists"]
    assert first["mean"] is None
    assert preset["candidate"] == result["preset"]
    assert second["candidate"] == result["winner"] != first["candidate"]
    assert load(tmp_path / "run" / "best").spec.digest.startswith(result["best"])


def test_the_option_reaches_the_config():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert parser.parse_args([]).slope_seeds == 0
    assert parser.parse_args(["--slope-seeds", "2"]).slope_seeds == 2


@pytest.mark.parametrize("seeds", [-1, 4])
def test_slope_seeds_are_some_of_the_final_ones(data, tmp_path, seeds):
    with pytest.raises(SpecError, match=rf"slope_seeds: {seeds} is outside 0 \.\. final_seeds 3"):
        named_search(replace(CONFIG, data=data, slope_seeds=seeds), tmp_path / "run", SPACE)
