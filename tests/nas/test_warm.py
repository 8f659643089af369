"""A search that begins with what earlier ones found."""

import json
import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_search import killed_after, outcome

from kizzasi.errors import StudyError
from kizzasi.models import Signal
from kizzasi.nas import ASHA, Finals, ModelSpace, Random, Search, choice, repeat
from kizzasi.nas.evaluators.evaluator import Job
from kizzasi.nas.executors.simulated import Simulated
from kizzasi.nas.study.journal import read_events

BLOCK = {"mixer": {"kind": "mamba", "d_state": choice(*range(1, 17))}}
SPACE = ModelSpace({"d_model": choice(8, 12), "stem": Signal(1, 1), "blocks": repeat(BLOCK, 1, 3)})


def loss(job: Job, report: object) -> float:
    return zlib.crc32(job.spec.digest.encode()) / 2**32 + 1 / job.budget


def other(job: Job, report: object) -> float:
    return loss(job, report)


def search(folder: Path, n: int, asked: list[str], *, train=loss, seed: int = 0) -> Search:
    def seconds(job: Job) -> float:
        return job.budget

    class Noted(Simulated):
        def submit(self, job: Job) -> None:
            asked.append(job.key)
            super().submit(job)

    return Search(
        SPACE,
        train,
        metric="loss",
        searcher=Random(n, seed, distinct=True),
        scheduler=ASHA(n, 3, 9),
        finals=Finals(n=1, budget=9, seeds=1),
        executor=lambda evaluator: Noted(evaluator, 3, seconds),
        folder=folder,
    )


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_events(folder / "journal.jsonl") if e["event"] == kind]


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    search(folder, 6, []).run()
    return folder


def test_what_was_trained_is_told_and_not_trained_again(first, tmp_path):
    asked: list[str] = []
    found = search(tmp_path / "run", 9, asked, seed=5).run(warm=[first])
    known = {e["id"]: e for e in events_of(first, "trial")}
    trials = {e["id"]: e for e in events_of(tmp_path / "run", "trial")}
    assert known.keys() & trials.keys()
    again = known.keys() & set(asked)
    assert len(again) <= 1, "the best model alone, whose weights stayed in the other folder"
    assert set(asked) - again == trials.keys() - known.keys()
    for own in known.keys() & trials.keys():
        assert trials[own].pop("facts") == {"earlier": str(first)}
        assert trials[own] == known[own]
    entered = [e["id"] for e in events_of(tmp_path / "run", "candidate")]
    assert set(entered[:6]) == {e["id"] for e in events_of(first, "candidate")}
    assert len(entered) == 9
    best = json.loads((first / "journal.jsonl").read_text().splitlines()[-1])["ranking"][0]
    assert entered[0] == best, "the best comes first"
    assert found.winner.spec.digest[:12] in entered


def test_a_resumed_warm_start_needs_no_other_folder(first, tmp_path):
    shutil.copytree(first, tmp_path / "gone")
    search(tmp_path / "whole", 9, []).run(warm=[tmp_path / "gone"])
    for moment in (8, 12):
        with killed_after(moment):
            search(tmp_path / f"{moment}", 9, []).run(warm=[tmp_path / "gone"])
    shutil.rmtree(tmp_path / "gone")
    for moment in (8, 12):
        search(tmp_path / f"{moment}", 9, []).run(resume=True)
        assert outcome(tmp_path / f"{moment}") == outcome(tmp_path / "whole")


def test_a_search_that_cannot_go_on_is_told_of_the_warm_start(first, tmp_path):
    own = search(shutil.copytree(first, tmp_path / "run"), 6, [])
    longer = replace(own, scheduler=ASHA(6, 9, 81))
    with pytest.raises(StudyError, match="cannot resume another search; scheduler: ") as told:
        longer.run(resume=True)
    way = f'in another folder it may begin with what was found here, by warm=["{own.folder}"]'
    assert str(told.value).endswith(way)
    replace(longer, folder=tmp_path / "longer").run(warm=[own.folder])
    with pytest.raises(StudyError, match="evaluator: ") as told:
        replace(own, evaluator=other).run(resume=True)
    assert "found here" not in str(told.value), "a warm start would be refused, too"


def test_runs_that_trained_otherwise_are_refused(first, tmp_path):
    with pytest.raises(StudyError, match=r"no warm start from it: evaluator is .*loss"):
        search(tmp_path / "run", 9, [], train=other).run(warm=[first])
    assert not (tmp_path / "run").exists()
    search(tmp_path / "begun", 3, []).run()
    with pytest.raises(StudyError, match="a warm start comes before the first trial"):
        search(tmp_path / "begun", 3, []).run(resume=True, warm=[first])
