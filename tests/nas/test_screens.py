"""Screens: proposals are the best of a few draws, and only siblings meet in one comparison."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from small_search import SPACE, killed_after, outcome, write_text

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens
from kizzasi.models.mixers import MambaSpec
from kizzasi.nas.evaluators.evaluator import Job
from kizzasi.nas.evaluators.probes import PROBES
from kizzasi.nas.search import SearchConfig, named_search
from kizzasi.nas.searchers.screened import Screened, one_at_a_time
from kizzasi.nas.spaces.rng import Xorshift64
from kizzasi.nas.study.journal import read_events
from kizzasi.nas.study.screens import Screen

CONFIG = SearchConfig(
    space="tiny",
    searcher="regularized",
    scheduler="asha",
    n_params=24_000,
    band=0.5,
    proxies=(),
    screens=("synflow", "inherit"),
    screen_width=3,
    screen_tokens=256,
    population=3,
    sample=2,
    side_by_side=2,
    rungs=(256, 512),
    eta=2,
    search_tokens=4_500,
    lrs=(3e-3,),
    final_tokens=256,
    seq_len=32,
    batch_size=4,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("screened")
    named_search(replace(CONFIG, data=write_text(folder)), folder / "run")
    return folder


def screens_of(folder, by: str) -> list[dict]:
    events = read_events(folder / "run" / "journal.jsonl")
    return [e for e in events if e["event"] == "screen" and e["by"] == by]


class Numbers:
    """A space of integers: the next three numbers of a counter, wherever it is asked."""

    def __init__(self) -> None:
        self.n = 0

    def sample(self, rng):
        self.n += 1
        return self.n

    def mutate(self, candidate, rng, prob):
        return candidate + self.sample(rng) % 3

    def crossover(self, a, b, rng):
        return a + b + self.sample(rng)


def test_a_proposal_is_the_best_of_its_draws():
    asked = []

    def worth(draw, parent):
        asked.append((draw, parent))
        return -abs(draw - 5)

    space, rng = Screened(Numbers(), one_at_a_time(worth), 3), Xorshift64(1)  # pyright: ignore[reportArgumentType]
    assert [space.sample(rng) for _ in range(3)] == [3, 5, 7]
    assert asked == [(n, None) for n in range(1, 10)]
    asked.clear()
    assert space.mutate(3, rng, 0.1) == 4  # not 5, which was proposed, nor 3, its parent
    assert {parent for _, parent in asked} <= {3}
    asked.clear()
    assert space.crossover(1, 2, rng) == 16
    assert {parent for _, parent in asked} == {1}


def test_what_cannot_be_judged_comes_last_and_of_equals_the_first():
    odd = one_at_a_time(lambda draw, _: math.nan if draw == 1 else draw % 2)
    space = Screened(Numbers(), odd, 3)  # pyright: ignore[reportArgumentType]
    assert space.sample(Xorshift64(1)) == 3
    space = Screened(Numbers(), one_at_a_time(lambda draw, _: None), 3)  # pyright: ignore[reportArgumentType]
    assert space.sample(Xorshift64(1)) == 1


def test_of_every_place_the_best_draw_was_proposed(finished):
    """A founder has no parent to inherit from, so the first of its places' winners takes part."""
    scores = {e["id"]: e["score"] for e in screens_of(finished, "synflow")}
    events = read_events(finished / "run" / "journal.jsonl")
    founders = [e["id"] for e in events if e["event"] == "candidate" and e["group"] == "random"]
    assert len(founders) == 3
    assert set(founders) <= set(scores)
    assert scores[founders[0]] == max(list(scores.values())[:3])


def test_children_inherit_and_meet_only_siblings(finished):
    events = read_events(finished / "run" / "journal.jsonl")
    children = screens_of(finished, "inherit")
    trials = {e["id"]: e for e in events if e["event"] == "trial"}
    assert len(children) >= 2
    for child in children:
        parent = trials[child["parent"]]
        assert child["inherited"]["parent"].startswith(parent["candidate"])
        assert child["inherited"]["parent_tokens"] == parent["tokens"]
        assert 0 < child["inherited"]["share"] <= 1
        assert child["tokens"] == 256
        assert child["score"] < 0
    scored = {e["id"] for e in events if e["event"] == "trial"}
    assert all(trials[own].get("inherited") is None for own in scored)  # what counts: from scratch


def test_a_parent_whose_rungs_are_over_still_gives_its_weights(finished):
    events = read_events(finished / "run" / "journal.jsonl")
    trials = {e["id"]: e for e in events if e["event"] == "trial"}
    assert "1" in {trials[e["parent"]]["rung"] for e in screens_of(finished, "inherit")}


def test_the_report_says_how_much_was_screened(finished):
    children = screens_of(finished, "inherit")
    n, tokens = len(children), sum(e["tokens"] for e in children)
    said = (finished / "run" / "report.md").read_text()
    assert f"synflow {len(screens_of(finished, 'synflow'))}, inherit {n} on {tokens:,}" in said


def test_killed_within_its_screens_it_ends_as_the_whole_one(finished, tmp_path):
    config = replace(CONFIG, data=str(finished / "text"))
    events = read_events(finished / "run" / "journal.jsonl")
    within = [i for i, e in enumerate(events) if e["event"] == "screen"]
    done = 0
    for stop in (within[2], within[-1], len(events) - 2):
        with killed_after(stop - done):
            named_search(config, tmp_path / "run", resume=True)
        done = stop
    named_search(config, tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == outcome(finished / "run")


def test_probes_and_the_analytic_proxy_screen_families(tmp_path, monkeypatch):
    monkeypatch.setitem(PROBES, "parity", replace(PROBES["parity"], steps=3))
    config = replace(
        CONFIG,
        data=write_text(tmp_path),
        space="families",
        searcher="random",
        screens=("analytic", "parity"),
        screen_width=2,
        n_params=22_000,
        search_tokens=1_200,
    )
    named_search(config, tmp_path / "run", SPACE)
    judged = screens_of(tmp_path, "parity")
    assert judged
    assert all(0 <= e["score"] <= 1 for e in judged)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"screens": ("synflo",)}, "did you mean synflow"),
        ({"screens": ("analytic",)}, "families"),
        ({"searcher": "tpe"}, "own choice"),
        ({"screen_width": 0}, "screen_width"),
    ],
)
def test_a_screen_that_cannot_work_is_refused(changes, rule):
    with pytest.raises(SpecError, match=rule):
        replace(CONFIG, **changes).check()


def test_a_probe_is_a_job_without_a_budget_of_its_own():
    spec, jobs = ModelSpec(8, (BlockSpec(MambaSpec(d_state=4)),), Tokens(16)), []

    def all_of(tasks):
        jobs.extend(task.job for task in tasks)
        return {task.key: {"score": 0.5} for task in tasks}

    plan: Any = SimpleNamespace(screen_tokens=256, seed=3, stem=Tokens(16))
    study: Any = SimpleNamespace(find=lambda *kind, **match: None, all_of=all_of)
    assert Screen("parity", plan, study, lambda spec: None)([spec], None) == [0.5]
    (job,) = jobs
    assert job == Job(spec, 0, 3, {"by": "parity"}, key=job.key, kind="probe")
