"""scripts/bench_optimizers.py chooses rates, trains a budget once, and says how rankings agree."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from small_search import write_text

from kizzasi.models import BlockSpec, ModelSpec, Tokens
from kizzasi.models.mixers import MambaSpec

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench_optimizers


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(bench_optimizers, "N_BOOT", 100)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    text = write_text(tmp_path)
    tiny = replace(bench_optimizers.CONFIG, rungs=(64, 640), seq_len=16, batch_size=2)
    monkeypatch.setattr(bench_optimizers, "CONFIG", tiny)
    monkeypatch.setattr(bench_optimizers, "FIRST", 64)
    monkeypatch.setattr(bench_optimizers, "RATES", {"adamw": (1e-3, 1e-2), "muon": (1e-2,)})
    models = [
        ModelSpec(d, (BlockSpec(MambaSpec(d_state=4)),), Tokens(256)) for d in (8, 10, 12, 16)
    ]
    monkeypatch.setattr(bench_optimizers, "families", lambda: {"small": models[0]})
    monkeypatch.setattr(bench_optimizers, "random_hybrids", lambda n: models[:n])

    def run(part, *more):
        journal = tmp_path / f"{part}.jsonl"
        bench_optimizers.main([part, "--journal", str(journal), "--data", text, *more])
        return capsys.readouterr().out

    return run


def test_families(run, monkeypatch):
    rows = json.loads(run("families", "--seeds", "2", "--json"))
    assert [(r["optimizer"], r["times"]) for r in rows] == [
        (o, t) for o in ("adamw", "muon") for t in (1, 3, 10)
    ]
    assert all(len(row["scores"]) == 2 for row in rows)
    first, second, third = (row["sweep"] for row in rows[:3])
    assert set(first) == {"0.001", "0.01"}
    assert set(third) <= set(second) <= set(first)
    for row in rows:
        assert row["sweep"][str(row["rate"])] == min(row["sweep"].values())
    assert rows[2]["scores"][0] < rows[0]["scores"][0]
    monkeypatch.setattr(bench_optimizers, "trained", None)  # nothing is trained twice
    text = run("families", "--seeds", "2")
    assert f"{sum(rows[0]['scores']) / 2:.3f}" in text
    assert "| small |" in text


def test_without_time_what_is_known_is_told(run):
    assert run("families", "--minutes", "0").count(" - ") == 6


def test_hybrids(run):
    found = json.loads(run("hybrids", "--n", "4", "--json"))
    assert len(found["hybrids"]) == 8
    for row in found["hybrids"]:
        assert row["scores"][0] == min(row["sweep"].values())
        assert row["scores"][2] < row["scores"][0]
        assert row["curve"][-1][0] == 640
    tau = {(t["short"], t["long"]): t for t in found["agreement"]}
    assert tau["adamw 3x", "adamw 10x"]["n"] == 4
    assert "Kendall tau-b" in run("hybrids", "--n", "4")


def test_agreement_of_known_rankings():
    def row(i, optimizer, *scores):
        return {"id": str(i), "optimizer": optimizer, "scores": list(scores)}

    rows = [row(i, "adamw", -i, i, i) for i in range(9)] + [
        row(i, "muon", i, i, i - 20) for i in range(9)
    ]
    tau = {(t["short"], t["long"]): t["tau"] for t in bench_optimizers.agreement(rows)}
    assert tau["adamw 1x", "adamw 10x"] == -1
    assert tau["muon 1x", "muon 10x"] == tau["adamw 10x", "muon 10x"] == 1
    assert tau["muon 1x less adamw 1x", "the better of both 10x"] == 2
    rows[0]["scores"][2] = None  # diverged: out of every ranking
    assert {t["n"] for t in bench_optimizers.agreement(rows)} == {8}
    assert bench_optimizers.agreement(rows[:2]) == []
