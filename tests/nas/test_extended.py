"""A finished search on the same folder with more of a budget: it goes on from what it has."""

import re

import pytest

from kizzasi.errors import StudyError
from kizzasi.nas import elsewhere
from kizzasi.nas.executors.simulated import Simulated
from kizzasi.nas.search import run_plan
from kizzasi.nas.study.config_file import read_config
from kizzasi.nas.study.journal import read_events
from kizzasi.train import Metric

SPACE = """
d_model: {choice: [16, 24, 32]}
tie_head: true
blocks: {repeat: {mixer: {kind: mamba, d_state: {choice: [4, 8, 16]}}}, low: 1, high: 2}
"""
CONFIG = """
space: {name: SPACE, n_params: 10000, band: 0.9}
searcher: {name: regularized, n_pool: 5, population: 2, sample: 2}
scheduler: {name: asha, rungs: [1, 3]BOUND}
training: {lrs: [0.1, 0.2]}
finals: {n_finalists: 1, final_tokens: 3, final_seeds: 1, slope_seeds: 0}
"""


@pytest.fixture
def run(tmp_path):
    """Runs the search in one folder; returns the ids of the trainings that it began."""
    (tmp_path / "space.yaml").write_text(SPACE)
    path = tmp_path / "search.yaml"

    def begun(*changes: tuple[str, str]) -> list[str]:
        text, folder = CONFIG.replace("SPACE", str(tmp_path / "space.yaml")), tmp_path / "run"
        for change in changes:
            text = text.replace(*change)
        path.write_text(text.replace("BOUND", ""))
        plan, trained = elsewhere.plan_elsewhere(read_config(path)[0], Metric("loss")), []

        def train(job, report):
            if job.budget:
                trained.append(job.key)
                job.checkpoint.touch()
            return float(job.spec.d_model % 32 + job.seed / 2**64 + 1 / max(1, job.budget))

        executor = Simulated(train, 1, lambda _: 1.0)
        run_plan(plan, folder, lambda _: executor, resume=folder.exists())
        return trained

    return begun


@pytest.mark.parametrize(
    ("then", "now", "setting"),
    [
        ("n_pool: 5", "n_pool: 8", "n_pool"),
        ("n_finalists: 1", "n_finalists: 3", "n_finalists"),
        ("final_seeds: 1", "final_seeds: 3", "final_seeds"),
        ("slope_seeds: 0", "slope_seeds: 1", "slope_seeds"),
        ("search_tokens: 8", "search_tokens: 14", "search_tokens"),
    ],
)
def test_what_was_trained_is_not_trained_again(run, tmp_path, then, now, setting):
    bound = "BOUND", ", search_tokens: 8"
    start = [bound] if setting == "search_tokens" else []
    first = run(*start)
    journal = tmp_path / "run" / "journal.jsonl"
    before = journal.read_text()
    more = run(*start, (then, now))
    assert more, "it goes on"
    assert len({*first, *more}) == len(first) + len(more)
    assert journal.read_text().startswith(before)
    grown = [e["config"] for e in read_events(journal) if e["event"] == "extended"]
    assert [setting in config for config in grown] == [True]
    assert run(*start, (then, now)) == [], "it is finished"


@pytest.mark.parametrize(
    "scheduler", ["halving", "stopping", "hyperband", "pasha", "pdh", "asha, side_by_side: 2"]
)
def test_more_candidates_under_every_scheduler(run, tmp_path, scheduler):
    """Who was promoted among five need not be promoted among nine."""
    chosen = ("name: asha", f"name: {scheduler}"), ("rungs: [1, 3]", "rungs: [1, 3, 9]")
    chosen = (*chosen, ("final_tokens: 3", "final_tokens: 9"))
    first = run(*chosen)
    more = run(*chosen, ("n_pool: 5", "n_pool: 9"))
    assert more, "it goes on"
    assert not {*first} & {*more}
    assert run(*chosen, ("n_pool: 5", "n_pool: 9")) == [], "it is finished"
    events = read_events(tmp_path / "run" / "journal.jsonl")
    assert [e["event"] for e in events].count("result") == 2


@pytest.mark.parametrize(
    ("then", "now", "why"),
    [
        (
            "[1, 3]",
            "[1, 9]",
            "rungs: [1, 3] then, [1, 9] now; every training's learning rate falls",
        ),
        ("final_tokens: 3", "final_tokens: 9", "3 then, 9 now; a final training's learning rate"),
        ("n_pool: 5", "n_pool: 4", "n_pool: 5 then, 4 now; it may only grow"),
        ("[0.1, 0.2]", "[0.1]", "lrs: [0.1, 0.2] then, [0.1] now"),
    ],
)
def test_what_would_be_another_search_is_refused_with_the_reason(run, then, now, why):
    run()
    with pytest.raises(StudyError, match=re.escape(why)):
        run((then, now))


def test_the_usual_number_of_candidates_is_a_number_too(run):
    run(("n_pool: 5, ", ""))
    with pytest.raises(StudyError, match="n_pool: 16 then, 14 now; it may only grow"):
        run(("n_pool: 5", "n_pool: 14"))
