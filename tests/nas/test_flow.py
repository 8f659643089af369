"""No worker waits while something can run; along its journal, a run decides as it decided."""

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from small_search import SPACE, config, killed_after, outcome, write_text

from kizzasi.errors import SpecError, StudyError
from kizzasi.models import ModelSpec, Signal
from kizzasi.nas import ASHA, Finals, ModelSpace, Search, choice, named_search, repeat
from kizzasi.nas.evaluators.evaluator import Job, Measurement
from kizzasi.nas.executors.simulated import Simulated
from kizzasi.nas.schedulers import Halving
from kizzasi.nas.schedulers.schedule import Results, Schedule
from kizzasi.nas.searchers import Flowing, Grid, LocalSearch, Random, RegularizedEvolution
from kizzasi.nas.searchers.ask_tell import AskTell
from kizzasi.nas.study.flow import Flow
from kizzasi.nas.study.journal import read_events
from kizzasi.nas.study.run import at_edges

BLOCK = {"mixer": {"kind": "mamba", "d_state": choice(*range(1, 17))}}
TEMPLATE = {"d_model": choice(8, 12, 16), "stem": Signal(1, 1), "blocks": repeat(BLOCK, 1, 4)}
RUNGS = {9: 9, 27: 18, 81: 54}


def chance(spec: ModelSpec, salt: int) -> float:
    return zlib.crc32(f"{salt} {spec.digest}".encode()) / 2**32


def loss(job: Job, report) -> float:
    return chance(job.spec, 0) + 1 / job.budget


def seconds(job: Job, salt: int = 1) -> float:
    """A candidate is up to four times as slow as another."""
    return RUNGS.get(job.budget, 1) * (1 + 3 * chance(job.spec, salt))


def search(folder: Path, searcher, scheduler, *, places: int = 8, salt: int = 1, train=loss):
    def clock(evaluator):
        return Simulated(evaluator, places, lambda job: seconds(job, salt))

    return Search(
        ModelSpace(TEMPLATE),
        train,
        metric="loss",
        searcher=searcher,
        scheduler=scheduler,
        settings={"lr": (0.1, 0.2)} if train is not loss else {},
        finals=Finals(n=1, budget=1, seeds=1),
        executor=clock,
        folder=folder,
    )


@pytest.mark.parametrize(
    ("searcher", "least"),
    [
        (Random(143, 0, distinct=True), 0.85),
        (RegularizedEvolution(8, 4, 143, 0.3, 0), 0.7),
        (LocalSearch(143, 8, "best", 0.3, 0), 0.7),
    ],
    ids=["random", "regularized", "local"],
)
def test_eight_workers_are_busy(tmp_path, monkeypatch, searcher, least):
    shares = []
    climb = Flow.climb

    def watched(self):
        climb(self)
        shares.append(self.study.executor.busy_share)

    monkeypatch.setattr(Flow, "climb", watched)
    search(tmp_path / "run", searcher, ASHA(143, 9, 81)).run()
    assert shares[0] >= least


def lines(folder: Path) -> list[str]:
    return (folder / "journal.jsonl").read_text().splitlines()


def test_a_journal_is_replayed_to_the_digit(tmp_path):
    searcher, scheduler = RegularizedEvolution(4, 2, 20, 0.3, 0), ASHA(20, 9, 81)
    found = search(tmp_path / "run", searcher, scheduler).run()
    whole = lines(tmp_path / "run")
    ends = ('"rung":"final"', '"event":"saved"', '"event":"result"')
    climbed = [line for line in whole if not any(end in line for end in ends)]
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "journal.jsonl").write_text("\n".join(climbed) + "\n")
    replayed = search(tmp_path / "again", searcher, scheduler).run(resume=True)
    assert replayed.summary.result == found.summary.result
    assert outcome(tmp_path / "again") == outcome(tmp_path / "run")


def test_a_result_that_is_there_twice_counts_once(tmp_path):
    searcher, scheduler = RegularizedEvolution(4, 2, 8, 0.3, 0), ASHA(8, 9, 27)
    found = search(tmp_path / "run", searcher, scheduler).run()
    whole = lines(tmp_path / "run")
    first = next(i for i, line in enumerate(whole) if '"event":"trial"' in line)
    twice = [*whole[: first + 1], *whole[first:-1]]  # and no result
    (tmp_path / "run" / "journal.jsonl").write_text("\n".join(twice) + "\n")
    again = search(tmp_path / "run", searcher, scheduler).run(resume=True)
    assert again.summary.result == found.summary.result


@pytest.mark.parametrize("places", [(8, 8, 3), (2, 5, 5)])
def test_a_run_goes_on_along_its_journal_on_any_machine(tmp_path, places):
    """Killed twice, with other numbers of workers: the whole journal can still be followed."""
    searcher, scheduler = RegularizedEvolution(4, 2, 20, 0.3, 0), ASHA(20, 9, 81)
    for n, moment in zip(places, (13, 24, None), strict=True):
        run = search(tmp_path / "run", searcher, scheduler, places=n)
        if moment is None:
            run.run(resume=True)
            continue
        with killed_after(moment):
            run.run(resume=True)
    whole = lines(tmp_path / "run")
    sessions = [json.loads(line)["places"] for line in whole if '"event":"session"' in line]
    assert sessions == [n for i, n in enumerate(places) if i == 0 or n != places[i - 1]]
    trials = [json.loads(line)["id"] for line in whole if '"event":"trial"' in line]
    assert len(set(trials)) == len(trials)
    before = outcome(tmp_path / "run")
    search(tmp_path / "run", searcher, scheduler).run(resume=True)
    assert outcome(tmp_path / "run") == before


def test_a_journal_of_other_decisions_is_refused(tmp_path):
    searcher, scheduler = RegularizedEvolution(4, 2, 8, 0.3, 0), ASHA(8, 9, 27)
    search(tmp_path / "run", searcher, scheduler).run()
    whole = lines(tmp_path / "run")
    trials = [i for i, line in enumerate(whole) if '"event":"trial"' in line]
    (tmp_path / "run" / "journal.jsonl").write_text(
        "\n".join([*whole[: trials[0]], *whole[trials[-3] :]]) + "\n"
    )
    with pytest.raises(StudyError, match="a result that this search does not ask for"):
        search(tmp_path / "run", searcher, scheduler).run(resume=True)


def test_where_scores_lead_nothing_any_order_gives_the_same_ranking(tmp_path):
    found, orders = [], []
    for salt, places in ((1, 8), (2, 8), (3, 1)):
        run = search(
            tmp_path / str(salt),
            Random(20, 0, distinct=True),
            Halving((9, 27, 81), 0.34),
            places=places,
            salt=salt,
        )
        result = run.run().summary.result
        order = [
            e["id"]
            for e in read_events(tmp_path / str(salt) / "journal.jsonl")
            if e["event"] == "trial"
        ]
        orders.append(order)
        found.append((result["ranking"], result["winner"], result["tokens"], sorted(order)))
    assert orders[0] != orders[1] != orders[2]
    assert found[0] == found[1] == found[2]


def test_a_sweep_holds_its_family_alone(tmp_path):
    """Two families; a slow sweep of one does not keep the other from training."""

    def train(job: Job, report) -> float:
        return chance(job.spec, 0) + abs(job.settings["lr"] - 0.1)

    search(tmp_path / "run", Random(10, 0, distinct=True), ASHA(10, 9, 27), train=train).run()
    events = read_events(tmp_path / "run" / "journal.jsonl")
    chosen = {e["family"]: e["settings"] for e in events if e["event"] == "settings"}
    assert set(map(json.dumps, chosen.values())) == {'{"lr": 0.1}'}
    swept = [e for e in events if e["event"] == "trial" and e["settings"] != {"lr": 0.1}]
    assert len(swept) == len(chosen)
    trials = [e["id"] for e in events if e["event"] == "trial"]
    assert len(set(trials)) == len(trials)


def test_proxies_are_jobs_of_the_workers(tmp_path, monkeypatch):
    small, kinds = config(write_text(tmp_path)), []
    submit = Simulated.submit

    def noted(self, job):
        kinds.append(job.kind)
        submit(self, job)

    monkeypatch.setattr(Simulated, "submit", noted)
    monkeypatch.setattr(
        "kizzasi.nas.search.open_executor",
        lambda evaluator, *_: Simulated(evaluator, 2, lambda job: 1 + job.budget % 7),
    )
    named_search(replace(small, proxies=("flops",), lrs=(3e-3,)), tmp_path / "run", SPACE)
    candidates = [
        e for e in read_events(tmp_path / "run" / "journal.jsonl") if e["event"] == "candidate"
    ]
    assert kinds.count("proxies") == len(candidates)
    assert all(e["proxies"]["flops"] > 0 for e in candidates)


def test_whose_proxies_are_done_first_does_not_choose_who_is_swept(tmp_path, monkeypatch):
    """Of two candidates of one family the first asked for shares the sweep, on any machine."""
    small, outcomes = config(write_text(tmp_path)), []
    for places, salt in ((1, 0), (4, 1), (4, 2), (4, 3)):

        def seconds(job: Job, salt: int = salt) -> float:
            return 1 + 9 * chance(job.spec, salt) if job.kind == "proxies" else 1

        def opened(evaluator, *_, places=places, seconds=seconds):
            return Simulated(evaluator, places, seconds)

        monkeypatch.setattr("kizzasi.nas.search.open_executor", opened)
        named_search(replace(small, proxies=("flops",)), tmp_path / f"{salt}", SPACE)
        outcomes.append(outcome(tmp_path / f"{salt}"))
    assert all(found == outcomes[0] for found in outcomes)


# --- streams


def numbers(n: int) -> ModelSpace:
    return ModelSpace(
        {"d_model": choice(*range(8, 8 + n)), "stem": Signal(1, 1), "blocks": [BLOCK]}
    )


@pytest.mark.parametrize(
    "searcher",
    [
        Random(12, 3),
        Random(12, 3, distinct=True, batch_size=5),
        Grid(12),
        RegularizedEvolution(12, 2, 12, 0.3, 3),
    ],
    ids=repr,
)
def test_a_stream_proposes_what_the_batches_do_where_no_score_is_needed(searcher):
    space, flowing = numbers(40), Flowing(searcher.stream(numbers(40)))
    batches, found = AskTell(searcher, space), []
    while batch := batches.ask():
        found += batch
        batches.tell([0.0] * len(batch))
    streamed = []
    while (candidate := flowing.propose()) is not None:
        streamed.append(candidate)
    assert streamed == found
    assert flowing.over


def test_a_stream_breeds_from_the_best_that_are_there(monkeypatch):
    space, parents = numbers(40), []
    mutate = ModelSpace.mutate
    monkeypatch.setattr(
        ModelSpace, "mutate", lambda self, c, *a: parents.append(c) or mutate(self, c, *a)
    )
    flowing = Flowing(RegularizedEvolution(3, 3, 30, 0.5, 0).stream(space))
    first = [flowing.propose() for _ in range(5)]  # five workers begin
    for number, score in ((4, 1.0), (0, 3.0), (2, 2.0)):
        flowing.tell(number, score)
    flowing.propose()
    assert set(parents) == {first[0]}, "the best of three, however many were proposed"
    parents.clear()
    flowing.tell(2, 9.0)  # trained further: its last score counts
    flowing.propose()
    assert set(parents) == {first[2]}
    parents.clear()
    flowing.tell(3, 0.0)
    flowing.tell(1, 0.0)
    flowing.tell(0, 99.0)  # no member any more: 2, 3 and 1 are
    flowing.propose()
    assert set(parents) == {first[2]}


def test_batches_learn_the_last_score_before_they_are_complete():
    search = AskTell(Grid(4), numbers(4))
    schedule = Schedule(ASHA(4, 1, 4, eta=2), search)
    scores = {(0, 1): 1.0, (1, 1): 2.0, (1, 2): 5.0}
    for _ in range(3):
        (job,) = schedule.ask()
        schedule.tell(job, scores[job.candidate, job.budget])
    assert search.history.scores == [1.0, 5.0]


def test_the_order_of_a_rung_is_kept_without_sorting():
    results, told = Results(), [(0, 1.0), (1, -math.inf), (2, 3.0), (3, 1.0), (4, 2.0)]
    for candidate, score in told:
        results.add(candidate, score)
    assert results.best(0) == [2, 4, 0, 3]
    assert results.best(0, 2) == [2, 4]
    assert results.best(1) == []


def test_checkpoints_of_those_that_run_are_not_tidied_away(tmp_path):
    def train(job: Job, report) -> Measurement:
        assert job.checkpoint is not None
        trained = int(job.checkpoint.read_text()) if job.checkpoint.exists() else 0
        assert trained or job.budget in (1, 9), "its checkpoint is gone"
        job.checkpoint.write_text(str(job.budget))
        return Measurement(chance(job.spec, 0), spent=job.budget)

    run = search(tmp_path / "run", RegularizedEvolution(4, 2, 40, 0.3, 0), ASHA(40, 9, 81))
    run = replace(run, evaluator=train)
    found = run.run()
    assert not [e for e in found.summary.trials if e["failure"]]
    assert list((tmp_path / "run" / "trials").iterdir()) == []


def test_checkpoints_are_looked_through_after_eight_results(tmp_path, monkeypatch):
    looks, tidy = [], Flow._tidy

    def noted(self):
        looks.append(len(self.study.scores))
        tidy(self)

    monkeypatch.setattr(Flow, "_tidy", noted)
    search(tmp_path / "run", Random(20, 0), ASHA(20, 9, 81)).run()
    assert looks[:2] == [8, 16]


def test_finalists_train_as_long_as_the_last_rung_with_seeds_of_their_own(tmp_path):
    jobs = []

    def train(job: Job, report) -> float:
        jobs.append((job.seed, job.budget))
        return chance(job.spec, 0)

    run = search(tmp_path / "run", Random(4, 0), Halving((9, 27, 81), 0.5))
    replace(run, evaluator=train, finals=Finals(n=1, seeds=2)).run()
    assert {budget for seed, budget in jobs if seed == 0} == {9, 27, 81}
    assert {job for job in jobs if job[0]} == {(1, 81), (2, 81)}


# --- what a search begins with, and what its sweeps say


def test_what_is_enqueued_comes_first(tmp_path):
    space = ModelSpace(TEMPLATE)
    wanted = [space.iterate(9)[n].spec for n in (8, 3)]
    run = search(tmp_path / "run", RegularizedEvolution(4, 2, 6, 0.3, 0), ASHA(6, 9, 27))
    replace(run, enqueue=wanted).run()
    entered = [e for e in read_events(tmp_path / "run" / "journal.jsonl") if "genotype" in e]
    assert [ModelSpec.from_dict(e["spec"]) for e in entered[:2]] == wanted
    with pytest.raises(SpecError, match=r"enqueue: .* does not lie in the space"):
        replace(run, enqueue=[wanted[0].replace(d_model=24)]).plan()


def test_a_best_setting_at_the_edge_of_its_sweep_is_told(tmp_path):
    grid = {"lr": (0.1, 0.2, 0.4), "flag": (True, False), "wd": (0.5,)}
    assert at_edges(grid, {"lr": 0.4, "flag": True, "wd": 0.5}) == {"lr": "highest"}
    assert at_edges(grid, {"lr": 0.2, "flag": True, "wd": 0.5}) == {}

    def train(job: Job, report) -> float:
        return chance(job.spec, 0) + job.settings["lr"]

    found = search(tmp_path / "run", Random(4, 0), ASHA(4, 9, 27), train=train).run()
    assert (
        found.summary.at_edge == "lr 0.1 is the lowest of its sweep; a better value may lie beyond"
    )
