"""The main job, small: it runs, resumes after kill -9 to the same result, and refuses bad input."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from kizzasi.errors import SpecError, StudyError
from kizzasi.models import load
from kizzasi.nas.arch_search import ArchSearchSpace
from kizzasi.nas.data import load_corpus
from kizzasi.nas.executors import InProcess, Job, Processes
from kizzasi.nas.microtrain import MicroTrain, Recipe, Training
from kizzasi.nas.search import Search, SearchConfig
from kizzasi.nas.spaces import FAMILIES, model_spec
from kizzasi.nas.storage import read_events

SPACE = ArchSearchSpace(
    d_model_options=(16, 32),
    d_state_options=(8, 16),
    n_layers_options=(1, 2),
    model_types=("transformer", "mamba"),
    expand_factor_options=(1.0, 2.0),
    dropout_options=(0.0,),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "text"
    path.write_bytes(b"".join(b"line %d of a small text\n" % (i * i % 997) for i in range(400)))
    return str(path)


def config(data: str) -> SearchConfig:
    return SearchConfig(
        data=data,
        n_params=22_000,
        band=0.4,
        n_pool=6,
        n_best=2,
        n_random=2,
        n_outside=1,
        rungs=(512, 1024),
        lrs=(3e-3, 1e-2),
        final_tokens=1536,
        seq_len=32,
        batch_size=4,
    )


def outcome(folder: Path) -> list[dict]:
    """What must not depend on interruptions: every event without its timings, in any order."""
    timed = ("seconds", "tokens_per_second")
    events = [
        json.dumps({k: v for k, v in event.items() if k not in timed}, sort_keys=True)
        for event in read_events(folder / "journal.jsonl")
    ]
    assert len(events) == len(set(events)), "an event stands twice"
    return sorted(events)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    Search(config(data), folder, SPACE).run()
    return folder


def test_a_search_leaves_a_report_and_a_runnable_winner(finished):
    events = read_events(finished / "journal.jsonl")
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
    assert Training(model, corpus, recipe).score() == pytest.approx(final["bits_per_byte"])
    assert model.generate(torch.tensor([108]), 5).shape == (6,)


def test_candidates_keep_to_the_band_and_rungs_to_their_budgets(finished):
    events = read_events(finished / "journal.jsonl")
    candidates = {e["id"]: e for e in events if e["event"] == "candidate"}
    for e in candidates.values():
        inside = 0.6 * 22_000 <= e["params"] <= 1.4 * 22_000
        assert inside == (e["group"] != "outside")
    budgets = {"0": 512, "1": 1024, "final": 1536}
    for e in events:
        if e["event"] == "trial":
            assert e["failure"] is None
            assert e["tokens"] == budgets[e["rung"]]
            assert e["rung"] == "0" or candidates[e["candidate"]]["group"] != "outside"


def test_a_finished_search_resumes_to_itself(finished, data):
    before = outcome(finished)
    Search(config(data), finished, SPACE).run(resume=True)
    assert outcome(finished) == before


@pytest.mark.parametrize("workers", [2])
def test_processes_give_the_result_of_one_process(finished, data, tmp_path, workers):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        Search(config(data), tmp_path / "run", SPACE, workers=workers).run()
    finally:
        torch.set_num_threads(threads)
    assert [json.loads(e).get("ranking") for e in outcome(tmp_path / "run")] == [
        json.loads(e).get("ranking") for e in outcome(finished)
    ]


PROGRAM = """
import json, sys
from pathlib import Path
from kizzasi.nas.arch_search import ArchSearchSpace
from kizzasi.nas.search import Search, SearchConfig
config, space, folder = json.loads(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
Search(SearchConfig.from_dict(config), folder, ArchSearchSpace(**space)).run(resume=True)
"""


def test_kill_9_at_random_moments_then_resume_equals_the_uninterrupted_run(
    finished, data, tmp_path
):
    """The uninterrupted run of `finished`, but with a process killed four times on its way."""
    space = {k: list(v) for k, v in vars(SPACE).items()}
    folder = tmp_path / "run"
    arguments = [json.dumps(config(data).to_dict()), json.dumps(space), str(folder)]
    command = [sys.executable, "-c", PROGRAM, *arguments]
    chance = random.Random(0)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    kills = 0
    while kills < 4:
        process = subprocess.Popen(command, **quiet)
        journal = folder / "journal.jsonl"
        size = journal.stat().st_size if journal.exists() else 0
        while process.poll() is None and not (journal.exists() and journal.stat().st_size > size):
            time.sleep(0.01)
        time.sleep(chance.random() * 0.4)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 2
    subprocess.run(command, check=True, **quiet)
    events = [json.loads(e) for e in outcome(folder)]
    scores = {e["id"]: e["bits_per_byte"] for e in events if e["event"] == "trial"}
    expected = {
        e["id"]: e["bits_per_byte"]
        for e in map(json.loads, outcome(finished))
        if e["event"] == "trial"
    }
    assert scores.keys() == expected.keys()
    assert scores == pytest.approx(expected, rel=1e-5)  # thread counts may differ between processes
    assert load(folder / "best").spec == load(finished / "best").spec


def test_runs_are_not_overwritten_or_mixed(finished, data):
    with pytest.raises(StudyError, match="holds a run already; use --resume"):
        Search(config(data), finished, SPACE).run()
    other = replace(config(data), seed=1)
    with pytest.raises(StudyError, match="cannot resume another search; seed: 0 then, 1 now"):
        Search(other, finished, SPACE).run(resume=True)


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
        Search(replace(config(data), **changes), tmp_path / "run", SPACE).run()


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
        Search(config(data), tmp_path / "run", SPACE).run()
    trials = [e for e in read_events(tmp_path / "run" / "journal.jsonl") if e["event"] == "trial"]
    assert len(trials) == 3
    monkeypatch.setattr(Training, "save", real)
    Search(config(data), tmp_path / "run", SPACE).run(resume=True)
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()


@pytest.mark.parametrize("executor", [InProcess, lambda e: Processes(e, 1)])
def test_a_trial_that_explodes_is_recorded_with_its_traceback(data, executor):
    corpus = load_corpus(data)
    spec = model_spec(
        "transformer",
        d_model=16,
        d_state=8,
        n_layers=1,
        expand_factor=1.0,
        dropout=0.0,
        vocab_size=256,
    )
    broken = MicroTrain(corpus, Recipe(512, seq_len=32, batch_size=4), device="meta")
    fine = Job("a", spec, 256, 0, 1e-3, 512)
    with executor(broken) as running, tqdm(disable=True) as bar:
        ((job, measured),) = list(running.run([fine], bar))
    assert job.key == "a"
    assert measured.bits_per_byte is None
    assert "Traceback" in measured.failure


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
