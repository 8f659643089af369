"""A search whose trainings happen elsewhere: `kizzasi ask`, `kizzasi tell`."""

import io
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from small_search import outcome

from kizzasi.cli import main
from kizzasi.errors import StudyError
from kizzasi.models import ModelSpec
from kizzasi.nas import elsewhere
from kizzasi.nas.executors.simulated import Simulated
from kizzasi.nas.report.found import Found
from kizzasi.nas.search import run_plan
from kizzasi.nas.study.config_file import read_config
from kizzasi.nas.study.journal import Journal, read_events
from kizzasi.train import Metric

SPACE = """
d_model: {choice: [16, 24]}
tie_head: true
blocks:
  repeat: {mixer: {kind: mamba, d_state: {choice: [4, 8, 16]}}}
  low: 1
  high: 2
"""
CONFIG = """
space: {name: SPACE, n_params: 10000, band: 0.9}
searcher: {name: regularized, n_pool: 4, population: 2, sample: 2}
scheduler: {name: asha, rungs: [1, 3]}
training: {lrs: [0.1, 0.2]}
finals: {n_finalists: 1, final_tokens: 3, final_seeds: 1}
"""


def score(job) -> float:
    text = f"{json.dumps(job['spec'], sort_keys=True)} {job['settings']}"
    return zlib.crc32(text.encode()) / 2**32 + 1 / job["budget"]


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    path = tmp_path / "search.yaml"
    path.write_text(CONFIG.replace("SPACE", str(tmp_path / "space.yaml")))
    return elsewhere.plan_elsewhere(read_config(path)[0], Metric("loss"))


def asked(plan, run: Path, n: int | None = None) -> list[dict[str, Any]]:
    jobs = elsewhere.ask(plan, run, n)
    assert isinstance(jobs, list)
    return jobs


def line(job, **more) -> str:
    return json.dumps({"id": job["id"], "score": score(job), **more})


def test_an_outside_loop_gives_what_a_search_gives(plan, tmp_path):
    def train(job, report):
        asked = {"spec": job.spec.to_dict(), "settings": dict(job.settings), "budget": job.budget}
        return score(asked)

    run_plan(plan, tmp_path / "whole", lambda _: Simulated(train, 1, lambda job: 1.0))
    run, n = tmp_path / "run", 0
    while not isinstance(jobs := elsewhere.ask(plan, run), Found):
        assert jobs == elsewhere.ask(elsewhere.plan_in(run), run), "asking changes nothing"
        n += elsewhere.tell(elsewhere.plan_in(run), run, [line(jobs[0])])
    assert outcome(run) == outcome(tmp_path / "whole")
    trials = [e for e in read_events(run / "journal.jsonl") if e["event"] == "trial"]
    assert n == len(trials)
    assert ModelSpec.from_file(run / "best" / "spec.yaml") == jobs.best.spec


def test_several_side_by_side_are_told_in_any_order(plan, tmp_path):
    run = tmp_path / "run"
    jobs = asked(plan, run, 3)
    assert len({job["id"] for job in jobs}) == 3
    lines = [line(jobs[2], spent=1, seconds=2.5), "", line(jobs[0])]
    assert elsewhere.tell(plan, run, lines) == 2
    again = asked(plan, run)
    assert len(again) == 3
    assert jobs[1] in again
    assert jobs[0] not in again
    told = [e for e in read_events(run / "journal.jsonl") if e["event"] == "trial"]
    assert [(e["id"], e["tokens"]) for e in told] == [(jobs[2]["id"], 1), (jobs[0]["id"], 1)]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "not JSON"),
        ('{"id": "ID", "score": NaN}', "NaN is not JSON; tell a failed trial by a score of null"),
        ('{"score": 1}', "id: missing"),
        ('{"id": "ID", "score": "1"}', "score: expected a number"),
        ('{"id": "ID", "score": 1, "secnds": 2}', "'secnds': unknown; did you mean seconds?"),
        ('{"id": "ID", "score": null}', "give a score, or a score of null and the reason"),
        ('{"id": "ID", "score": 1, "failure": "no"}', "give a score, or a score of null"),
        ('{"id": "strange-1", "score": 1}', "'strange-1' was not asked for"),
        ('{"id": "ID", "score": 1}\n{"id": "ID", "score": 2}', "line 3: id: ID stands in line 2"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(plan, tmp_path, text, fault):
    run = tmp_path / "run"
    jobs = asked(plan, run, 2)
    before = (run / "journal.jsonl").read_bytes()
    lines = [line(jobs[1]), *text.replace("ID", jobs[0]["id"]).split("\n")]
    with pytest.raises(StudyError) as told:
        elsewhere.tell(plan, run, lines)
    assert fault.replace("ID", jobs[0]["id"]) in str(told.value)
    assert "line 1:" not in str(told.value)
    assert (run / "journal.jsonl").read_bytes() == before


def told_by(capsys, arguments: list[str]) -> tuple[int, str, str]:
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_programs(plan, tmp_path, capsys, monkeypatch):
    run, config = str(tmp_path / "run"), str(tmp_path / "search.yaml")
    code, _, err = told_by(capsys, ["ask", run])
    assert (code, "holds no search yet; give --config FILE and --metric NAME" in err) == (2, True)
    code, out, _ = told_by(capsys, ["ask", run, "--config", config, "--metric", "loss", "--n", "2"])
    jobs = [json.loads(text) for text in out.splitlines()]
    assert (code, len(jobs)) == (0, 2)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{line(jobs[0])}\nno\n[]\n"))
    code, _, err = told_by(capsys, ["tell", run])
    assert (code, [text[:21] for text in err.splitlines()]) == (
        2,
        ["kizzasi tell: line 2:", "kizzasi tell: line 3:"],
    )
    monkeypatch.setattr("sys.stdin", io.StringIO(line(jobs[0])))
    assert told_by(capsys, ["tell", run])[:2] == (0, "1 told\n")
    with Journal(tmp_path / "run" / "journal.jsonl"):
        code, _, err = told_by(capsys, ["ask", run])
    assert (code, "another process is writing this run" in err) == (2, True)
    Path(config).write_text(Path(config).read_text() + "seed: 7\n")
    code, _, err = told_by(capsys, ["ask", run, "--config", config, "--metric", "loss"])
    assert (code, "cannot resume another search; seed: 0 then, 7 now" in err) == (2, True)
