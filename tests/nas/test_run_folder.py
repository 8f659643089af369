"""A run writes, replaces and deletes only what is its own; a full disk costs nothing."""

import errno
import hashlib
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_search import killed_after, outcome, write_text

from kizzasi import files
from kizzasi.errors import CheckpointError, KizzasiError, StudyError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, load
from kizzasi.models.mixers import AttentionSpec
from kizzasi.nas import (
    ASHA,
    Finals,
    Job,
    MicroTrain,
    ModelSpace,
    Random,
    Search,
    SearchConfig,
    choice,
    named_search,
)
from kizzasi.nas.executors.execute import evaluate
from kizzasi.nas.report.export import export
from kizzasi.nas.study import identity
from kizzasi.nas.study.journal import Journal, read_events
from kizzasi.train import Recipe
from kizzasi.train.bytes import load_corpus


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return load_corpus(write_text(tmp_path_factory.mktemp("data")), test_fraction=0.1)


def search(task, folder: Path, **changes) -> Search:
    block = {"mixer": {"kind": "attention", "n_heads": choice(1, 2)}}
    blocks = {"pattern": "a", "n_layers": choice(1, 2), "letters": {"a": block}}
    given = {
        "baselines": [ModelSpec(8, (BlockSpec(AttentionSpec(2)),), Tokens(256))],
        "searcher": Random(2, 0),
        "scheduler": ASHA(3, 64, 128, 2),
        "finals": Finals(1, 128, seeds=1),
    }
    space = ModelSpace({"d_model": 8, "stem": Tokens(256), "blocks": blocks})
    recipe = Recipe(128, seq_len=16, batch_size=2, score_windows=4)
    return Search(space, MicroTrain(task, recipe), folder=folder, **{**given, **changes})


@pytest.fixture(scope="module")
def finished(task, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    search(task, folder).run()
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["trials/mine.pt", "best/config.json", "report.md"])
def test_a_folder_that_is_no_run_is_refused_and_stays(task, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    with pytest.raises(StudyError, match="not of a run"):
        search(task, tmp_path).run()
    assert tree(tmp_path) == {name: b"precious"}


def test_all_that_stands_in_the_way_of_a_run_is_named_at_once(task, tmp_path):
    for name in ("config.yaml", "report.md"):
        (tmp_path / name).write_text("precious")
    (tmp_path / "best").mkdir()
    (tmp_path / "best/config.json").write_text("precious")
    with pytest.raises(StudyError, match=r"holds best, config\.yaml, report\.md, not of a run"):
        search(task, tmp_path).run()


@pytest.mark.parametrize("name", ["trials", "best"])
def test_a_link_where_a_run_writes_is_refused(task, finished, tmp_path, name):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / ("0" * 16 + ".pt")).write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / "journal.jsonl").write_bytes((finished / "journal.jsonl").read_bytes())
    (run / name).symlink_to(mine)
    with pytest.raises(StudyError, match=f"{name}: a link"):
        search(task, run).run(resume=True)
    assert tree(mine) == {"0" * 16 + ".pt": b"precious"}


@pytest.mark.parametrize("text", ["ssh-rsa AAAA me@home\n", "precious", '{"text": 1}\n', '{"a'])
@pytest.mark.parametrize("linked", [False, True])
def test_a_journal_that_is_none_of_ours_is_never_cut(task, tmp_path, text, linked):
    mine, run = tmp_path / "mine", tmp_path / "run"
    run.mkdir()
    mine.write_text(text)
    if linked:
        (run / "journal.jsonl").symlink_to(mine)
    else:
        (run / "journal.jsonl").write_text(text)
    with pytest.raises(StudyError, match=r"journal\.jsonl"):
        search(task, run).run(resume=True)
    assert (run / "journal.jsonl").read_text() == mine.read_text() == text


def test_strange_checkpoints_beside_ours_stay(task, tmp_path):
    with killed_after(5):
        search(task, tmp_path / "run").run()
    strange = tmp_path / "run" / "trials" / "gpt.pt"
    strange.write_text("precious")
    search(task, tmp_path / "run").run(resume=True)
    assert tree(strange.parent) == {"gpt.pt": b"precious"}


def test_best_is_this_runs_winner_or_the_run_stops(task, finished, tmp_path):
    saved = [e for e in read_events(finished / "journal.jsonl") if e["event"] == "saved"]
    weights = (finished / "best" / "model.safetensors").read_bytes()
    assert saved[-1]["files"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    run = tmp_path / "run"
    search(task, run).run()
    (run / "best" / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(StudyError, match="a model that this search did not write; move it away"):
        search(task, run).run(resume=True)
    (run / "best").rename(tmp_path / "moved")
    search(task, run).run(resume=True)
    assert (run / "best" / "model.safetensors").read_bytes() == weights
    assert load(run / "best").spec == load(finished / "best").spec


class Disk:
    """A disk for all that is written by files.py, with so much room and no more."""

    def __init__(self, patch, room: int) -> None:
        self.room, real = room, files._Watched
        patch.setattr(files, "_Watched", lambda file: real(self.over(file)))

    def over(self, file):
        self.file = file
        return self

    def flush(self) -> None:
        self.file.flush()

    def write(self, data) -> int:
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)


@pytest.mark.parametrize("room", [0, 30_000, 200_000])
def test_a_full_disk_is_no_fault_of_any_trial(task, finished, tmp_path, monkeypatch, room):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        Disk(patch, room)
        with pytest.raises(StudyError, match=r"make room"):
            search(task, run).run()
    assert not list(run.rglob("*.partial"))
    search(task, run).run(resume=True)
    assert outcome(run) == outcome(finished)
    assert not list(run.rglob("*.partial"))


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
@pytest.mark.parametrize("write", ["ours", "torch's"])
def test_a_limit_on_file_sizes_is_the_users_error(tmp_path, write):
    import resource

    def train(job, report):
        if write == "ours":
            tensors = {str(i): torch.zeros(5000) for i in range(3)}
            files.write_file(tmp_path / "a.pt", lambda file: torch.save(tensors, file))
        else:
            torch.save(torch.zeros(50_000), tmp_path / "b.pt")
        return 1.0

    job = Job(ModelSpec(8, (BlockSpec(AttentionSpec(2)),), Tokens(9)), 1, 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, before[1]))
    try:
        with pytest.raises(StudyError, match="make room, then --resume"):
            evaluate(train, job, lambda n: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob(".*"))


def test_a_second_writer_is_refused_and_the_first_undisturbed(task, finished, tmp_path):
    with killed_after(4):
        search(task, tmp_path / "run").run()
    with (
        Journal(tmp_path / "run" / "journal.jsonl"),
        pytest.raises(StudyError, match="another process is writing this run"),
    ):
        search(task, tmp_path / "run").run(resume=True)
    search(task, tmp_path / "run").run(resume=True)
    assert outcome(tmp_path / "run") == outcome(finished)


def test_a_refused_run_leaves_no_folder_and_blocks_nothing(task, tmp_path):
    strict = search(task, tmp_path / "a" / "run").constraints.__class__(params=(1, 2))
    with pytest.raises(KizzasiError, match="params"):
        search(task, tmp_path / "a" / "run", constraints=strict).run()
    assert list(tmp_path.iterdir()) == []
    with killed_after(2):  # before any trial
        search(task, tmp_path / "run").run()
    search(task, tmp_path / "run", seed=5).run()
    config = read_events(tmp_path / "run" / "journal.jsonl")[0]["config"]
    assert config["seed"] == 5


def test_other_versions_are_written_down_and_said(task, finished, tmp_path, monkeypatch, capsys):
    event = read_events(finished / "journal.jsonl")[0]
    assert event["versions"] == identity.versions()
    with killed_after(5):
        search(task, tmp_path / "run").run()
    told = {**identity.versions(), "torch": "9.9"}
    monkeypatch.setattr(identity, "versions", lambda: told)
    search(task, tmp_path / "run").run(resume=True)
    captured = capsys.readouterr()
    assert "resumed with other versions: torch" in captured.out + captured.err


def test_what_a_killed_writer_left_is_swept_and_nothing_else(task, tmp_path):
    with killed_after(5):
        search(task, tmp_path / "run").run()
    trials = tmp_path / "run" / "trials"
    (trials / (".x.pt." + "0" * 16 + ".partial")).write_text("half")
    (trials / "mine.partial").write_text("precious")
    search(task, tmp_path / "run").run(resume=True)
    assert tree(trials) == {"mine.partial": b"precious"}


def test_what_a_worker_left_that_was_killed_is_swept_at_the_end(task, tmp_path, monkeypatch):
    real, trials = MicroTrain.__call__, tmp_path / "run" / "trials"

    def killed_on_the_way(self, job, report):
        (trials / f".x.pt.{len(list(trials.iterdir())):016x}.partial").write_text("half")
        return real(self, job, report)

    monkeypatch.setattr(MicroTrain, "__call__", killed_on_the_way)
    search(task, tmp_path / "run").run()
    assert tree(trials) == {}


def test_budgets_may_grow_and_paths_may_change(tmp_path):
    space = tmp_path / "space.yaml"
    block = {"mixer": {"kind": "attention", "n_heads": {"choice": [1, 2]}}}
    template = {"d_model": {"choice": [16, 24]}, "stem": {"kind": "tokens", "vocab_size": 256}}
    text = {"repeat": block, "low": 1, "high": 2}
    space.write_text(json.dumps({**template, "tie_head": True, "blocks": text}))
    data = write_text(tmp_path)
    config = SearchConfig(
        data=data, space=str(space), searcher="random", scheduler="asha", n_params=8000, band=0.6,
        n_pool=2, rungs=(64, 128), lrs=(3e-3,), final_tokens=128, final_seeds=1, seq_len=16,
        batch_size=2, score_windows=4, proxies=(),
    )  # fmt: skip
    run = tmp_path / "run"
    named_search(config, run)
    n = len(read_events(run / "journal.jsonl"))
    other, again = tmp_path / "elsewhere", tmp_path / "copy.yaml"
    other.write_bytes(Path(data).read_bytes())
    again.write_text(space.read_text())
    moved = replace(config, data=str(other), space=str(again))
    named_search(moved, run, resume=True)
    assert len(read_events(run / "journal.jsonl")) == n, "the same search"
    grown = replace(moved, n_pool=3, final_seeds=2)
    found = named_search(grown, run, resume=True)
    events = read_events(run / "journal.jsonl")
    assert {"event": "extended", "config": {"n_pool": 3, "final_seeds": 2}} in events
    assert [e["event"] for e in events].count("result") == 2
    assert len(found.best.scores) == 2
    assert found.summary.study["config"]["final_seeds"] == 2
    with pytest.raises(StudyError, match="final_seeds: 2 then, 1 now"):
        named_search(replace(grown, final_seeds=1), run, resume=True)
    fresh = named_search(grown, tmp_path / "fresh")
    assert [f.name for f in fresh.finals] == [f.name for f in found.finals]
    assert [f.scores for f in fresh.finals] == [f.scores for f in found.finals]


def test_an_export_replaces_only_itself(finished, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    export(finished, out)
    whole = tree(out)
    export(finished, out)
    (out / "README.md").write_text("mine")
    with pytest.raises(StudyError, match=r"README\.md: there already.*--overwrite"):
        export(finished, out)
    export(finished, out, overwrite=True)
    assert tree(out) == whole
    for name in ("generate.py", "config.json", "model.safetensors"):
        other.mkdir()
        (other / name).write_text("precious")
        with pytest.raises(StudyError, match=f"{name}: there already"):
            export(finished, other)
        assert tree(other) == {name: b"precious"}
        other.rename(tmp_path / f"seen {name}")
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "export").symlink_to(tmp_path)
    with pytest.raises(StudyError, match="export: a link out of the run"):
        export(run, run / "export")
    weights = run / "best" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(StudyError, match="not as the search wrote it"):
        export(run, tmp_path / "new")


def test_an_export_without_room_leaves_nothing(finished, tmp_path, monkeypatch):
    for room in (0, 3_000, 20_000):
        with monkeypatch.context() as patch:
            Disk(patch, room)
            with pytest.raises(CheckpointError, match="No space left"):
                export(finished, tmp_path / "out")
        assert tree(tmp_path) == {}
