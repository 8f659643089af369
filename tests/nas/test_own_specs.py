"""Architectures of an outside proposer in a search by `kizzasi ask` and `kizzasi tell`."""

import json
from dataclasses import replace

import pytest
from test_ask import CONFIG, SPACE, asked, line

from kizzasi.cli import main
from kizzasi.errors import StudyError
from kizzasi.models import ModelSpec, Tokens
from kizzasi.models.layers.block import BlockSpec
from kizzasi.models.mixers import MambaSpec
from kizzasi.nas import elsewhere
from kizzasi.nas.study.config_file import read_config
from kizzasi.nas.study.journal import read_events
from kizzasi.train import Metric

OWN = ModelSpec(20, (BlockSpec(MambaSpec(d_state=5)),), Tokens(256), tie_head=True)


def own(spec: ModelSpec = OWN) -> str:
    return json.dumps({"spec": spec.to_dict()})


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    path = tmp_path / "search.yaml"
    path.write_text(CONFIG.replace("SPACE", str(tmp_path / "space.yaml")))
    return elsewhere.plan_elsewhere(read_config(path)[0], Metric("loss"))


def test_a_spec_of_the_users_takes_part_and_wins(plan, tmp_path):
    run = tmp_path / "run"
    jobs = asked(plan, run, 2)
    assert elsewhere.tell(plan, run, [own(), own(), line(jobs[0])]) == 3
    before, n = (run / "journal.jsonl").read_bytes(), 0
    while isinstance(jobs := elsewhere.ask(elsewhere.plan_in(run), run), list):
        assert jobs == elsewhere.ask(elsewhere.plan_in(run), run), "asking changes nothing"
        mine = [job for job in jobs if ModelSpec.from_dict(job["spec"]) == OWN]
        n += len(mine)
        told = [json.dumps({"id": job["id"], "score": -1.0}) for job in mine[:1]]
        elsewhere.tell(elsewhere.plan_in(run), run, told or [line(jobs[0])])
    assert jobs.winner.spec == jobs.best.spec == OWN
    assert n >= 4, "a sweep, the next rung, a final training"
    events = read_events(run / "journal.jsonl")
    entered = [e for e in events if e["event"] == "candidate"]
    assert len(entered) == 4 + len(plan.baselines), "it counts among the candidates"
    (mine,) = (e for e in entered if e["id"] == OWN.digest[:12])
    assert mine["group"] == "searched"
    assert (run / "journal.jsonl").read_bytes().startswith(before)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"score": 1.0}, "spec: stands alone in its line; leave 'score' out"),
        ({"spec": 3}, "spec: expected a mapping"),
        ({"spec": {"d_modle": 4}}, "spec.d_modle: unknown; did you mean d_model?"),
        ({"spec": OWN.replace(dropout=1.0).to_dict()}, "dropout: 1.0 is outside"),
        ({"spec": OWN.replace(stem=Tokens(8)).to_dict()}, "stem: the model has"),
        ({"spec": OWN.replace(d_model=4000).to_dict()}, "which bounds this search"),
        ({"spec": OWN.replace(blocks=OWN.blocks * 5000).to_dict()}, "more than 4096 layers"),
    ],
)
def test_a_spec_that_breaks_a_rule_is_named_and_nothing_is_written(plan, tmp_path, change, fault):
    run = tmp_path / "run"
    jobs = asked(plan, run)
    before = (run / "journal.jsonl").read_bytes()
    wrong = json.dumps({"spec": OWN.to_dict(), **change})
    with pytest.raises(StudyError) as told:
        elsewhere.tell(plan, run, [line(jobs[0]), wrong, own()])
    assert str(told.value).startswith("line 2: ")
    assert fault in str(told.value)
    assert "line 3" not in str(told.value)
    assert (run / "journal.jsonl").read_bytes() == before


def test_a_spec_that_comes_too_late_is_refused(plan, tmp_path):
    run = tmp_path / "run"
    jobs = asked(plan, run, 40)
    before = (run / "journal.jsonl").read_bytes()
    with pytest.raises(StudyError, match="wants no more candidates than those that it has"):
        elsewhere.tell(plan, run, [line(jobs[0]), own()])
    assert (run / "journal.jsonl").read_bytes() == before
    assert asked(plan, run) == jobs


def test_a_search_in_waves_takes_no_spec(plan, tmp_path):
    run = tmp_path / "run"
    waves = replace(plan, side_by_side=2, described={**plan.described, "side_by_side": 2})
    jobs = asked(waves, run, 2)
    before = (run / "journal.jsonl").read_bytes()
    with pytest.raises(StudyError, match="one without side_by_side"):
        elsewhere.tell(waves, run, [line(jobs[0]), own()])
    assert (run / "journal.jsonl").read_bytes() == before


def test_the_program(plan, tmp_path, capsys):
    run, lines = tmp_path / "run", tmp_path / "lines.jsonl"
    asked(plan, run)
    lines.write_text(own())
    assert main(["tell", str(run), str(lines)]) == 0
    assert capsys.readouterr().out == "1 told\n"
    assert any(ModelSpec.from_dict(job["spec"]) == OWN for job in asked(plan, run, 40))
