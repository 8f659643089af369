"""`kizzasi sweep` and `kizzasi evolve`: both halves run, and a run that is cut ends the same."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kizzasi.cli import main
from kizzasi.nas.pipelines import Pipeline
from kizzasi.nas.pipelines.observing import calibration_error
from kizzasi.nas.pipelines.report import qpc
from kizzasi.nas.schedulers import Results, Sweep
from kizzasi.testing import check_scheduler

MIXERS = {
    "a": {"kind": "Attention", "heads": 2},
    "m": {"kind": "SSM", "d_state": 2},
    "r": {
        "kind": "route",
        "choices": [{"kind": "Attention", "heads": 2}, {"kind": "SSM", "d_state": 2}],
        "router": {"topk": 1},
    },
}
COMMON = ["--asha-min", "2", "--asha-max", "4", "--reduction", "2", "--seq-len", "16"]
COMMON += ["--batch-size", "2", "--score-windows", "4", "--json"]


@pytest.fixture
def seeds(tmp_path):
    folder = tmp_path / "seeds"
    folder.mkdir()
    for name, mixer in MIXERS.items():
        unit = mixer if "choices" in mixer else {"kind": "single", "mixer": mixer}
        arch = {"d_model": 16, "n_layers": 1, "norm": "RMSNorm", "mix_unit": unit}
        data = {"arch": arch, "train": {"ctx_len": 32}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data))
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(97, 123)) * 300)
    return [str(folder), "--data", str(text), *COMMON]


def test_a_sweep_goes_wide_then_deep(capsys, tmp_path, seeds):
    out = tmp_path / "run"
    assert main(["sweep", *seeds, "--pdh-stages", "6", "8", "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["stages_reached"] == 4  # two rungs, and both stages of the depth
    report = json.loads((out / "search_report.json").read_text())
    assert report["asha"]["evaluated"] == 3
    assert report["asha"]["survivors"] == 1
    assert [row["steps"] for row in report["deep_evaluations"]] == [6, 8]
    for row in report["asha"]["history"]:
        assert row["loss_start"] > 0
        assert row["qpc"] == qpc(row["loss_start"], row["loss_final"], row["flops"])
        assert 0 <= row["metrics"]["ece"] <= 1
    loads = [row["metrics"]["router"] for row in report["candidates"] if "routed" in row["name"]]
    assert [sum(load) for router in loads for load in router.values()] == [pytest.approx(1)]
    assert report["candidates"][0]["total_flops"] > 0
    assert report["candidates"][0]["architecture"]["d_model"] == 16


def test_an_evolution_that_is_cut_ends_the_same(capsys, tmp_path, seeds):
    out = tmp_path / "run"
    more = ["--generations", "1", "--population", "3", "--top-k", "2", "--out", str(out)]
    assert main(["evolve", *seeds, *more]) == 0
    result = json.loads(capsys.readouterr().out)
    born = (out / "lineage.jsonl").read_text()
    rows = [json.loads(line) for line in born.splitlines()]
    assert [row["op"] for row in rows[:3]] == [["seed"]] * 3
    assert any(row["parents"] for row in rows[3:])
    children = [Pipeline.from_file(out / row["child"]) for row in rows]
    assert [p.spec.digest[:12] for p in children] == [row["id"] for row in rows]
    best = Pipeline.from_file(out / "best.yaml").spec
    assert best.cost(1).params == result["params"]
    assert best.cost(1).params <= max(p.spec.cost(1).params for p in children[:3])
    journal = out / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[: len(lines) // 2]))
    assert main(["evolve", *seeds, *more, "--resume"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again == result
    assert (out / "lineage.jsonl").read_text() == born


# Imports once and forks for every run, which then starts at once.
PROGRAM = """
import json, os, sys
import torch
from kizzasi.cli import main
torch.set_num_threads(1)
for line in sys.stdin:
    if (pid := os.fork()) == 0:
        try:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1), os.dup2(silent, 2)
            os._exit(main(json.loads(line)))
        finally:
            os._exit(1)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_evolution_that_is_killed_ends_the_same(capsys, tmp_path, seeds):
    """kill -9 a few events after every start, until a start comes through to the end."""
    args = ["evolve", *seeds, "--generations", "1", "--population", "3", "--top-k", "2", "--out"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*args, str(whole)]) == 0
    expected = json.loads(capsys.readouterr().out)
    journal, kills, resume = cut / "journal.jsonl", 0, []
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    starter: Any
    with subprocess.Popen([sys.executable, "-c", PROGRAM], **pipes) as starter:
        for n in (0, 3, 5):  # events after the start; 0: as soon as there is a journal
            starter.stdin.write(json.dumps([*args, str(cut), *resume]) + "\n")
            starter.stdin.flush()
            pid, before = int(starter.stdout.readline()), events(journal)
            while Path(f"/proc/{pid}").exists() and (
                not journal.exists() if n == 0 else events(journal) < before + n
            ):
                time.sleep(0.002)
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
            kills += int(starter.stdout.readline()) == -signal.SIGKILL
            resume = ["--resume"]
        starter.stdin.close()
    assert kills >= 2
    assert main([*args, str(cut), "--resume"]) == 0
    result = json.loads(capsys.readouterr().out)
    said = {name: str(value).replace(str(cut), str(whole)) for name, value in result.items()}
    assert said == {name: str(value) for name, value in expected.items()}
    files = [path.relative_to(whole) for path in whole.rglob("*.yaml")]
    files += [path.relative_to(whole) for path in whole.rglob("lineage.jsonl")]
    assert len(files) > 6
    for name in files:
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name


def events(journal):
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


@pytest.mark.parametrize("n", [1, 4, 12])
@pytest.mark.parametrize("stages", [(), (27, 81)])
def test_the_scheduler_of_a_sweep(n, stages):
    check_scheduler(Sweep(n, 1, 9, 3, stages), n)


def test_the_depth_begins_when_the_breadth_has_settled():
    sweep, results = Sweep(4, 1, 2, 2, (3, 4)), Results()
    for candidate, score in enumerate((0.1, 0.4, 0.2, 0.3)):
        assert 4 not in sweep.budgets(candidate + 4)
        results.add(candidate, score)
    assert sweep.survivors(results) == [1, 3]
    results.add(1, 0.5)
    results.add(3, 0.7)
    assert sweep.survivors(results) == [3]  # 1 does not clear the mean, 0.6
    results.add(3, 0.8)
    assert sweep.survivors(results) == [3]  # alone, it goes on to the last stage
    results.add(3, 0.9)
    assert not sweep.survivors(results)


def test_calibration_error():
    sure = torch.tensor([0.9, 0.9, 0.2, 0.2])
    hits = torch.tensor([1.0, 1.0, 0.0, 1.0])
    assert calibration_error(sure, hits) == pytest.approx((2 * 0.1 + 2 * 0.3) / 4)
