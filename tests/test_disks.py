"""Real disks that are full or read-only: one line, and the same result once there is room.

They need the right to mount, as root in a container has, and are skipped without it.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kizzasi.cli import main
from kizzasi.models import BlockSpec, ModelSpec, Tokens
from kizzasi.models.mixers import AttentionSpec
from kizzasi.train.trainer import Training

KIB = 1024
SHAPE = ["--seq-len", 16, "--batch-size", 2]
SEARCH = ["--searcher", "random", "--params", 8000, "--band", 0.6, "--candidates", 2, *SHAPE]
SEARCH += ["--scheduler", "halving", "--rungs", 64, 128, "--tokens", 128, "--final-seeds", 1]
SEARCH += ["--score-windows", 4, "--proxies", "--lrs", 3e-3, "--workers", 1]
CLOCKED = ("seconds", "tokens_per_second")


@pytest.fixture
def mounted(tmp_path):
    """Mounts something and takes it away in the end; skips where that is not allowed."""
    places = []

    def mount(*options, where="disk") -> Path:
        place = tmp_path / where
        place.mkdir(exist_ok=True)
        done = subprocess.run(["mount", *options, str(place)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no right to mount: {done.stderr.strip()}")
        places.append(place)
        return place

    if shutil.which("mount") is None:
        pytest.skip("no program to mount with")
    yield mount
    for place in reversed(places):
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    ModelSpec(8, (BlockSpec(AttentionSpec(n_heads=2)),), Tokens(256)).to_file("spec.yaml")
    block = {"mixer": {"kind": "attention", "n_heads": {"choice": [1, 2]}}}
    space = {"d_model": 16, "stem": {"kind": "tokens", "vocab_size": 256}, "tie_head": True}
    space["blocks"] = {"repeat": block, "low": 1, "high": 2}
    Path("space.json").write_text(json.dumps(space))
    Path("text").write_text("".join(f"line {i * i % 997} of a small text\n" for i in range(300)))
    return tmp_path


def search(out, *more, data="text"):
    return ["search", "--data", data, "--space", "space.json", "--out", out, *SEARCH, *more]


def train(out, *more):
    return ["train", "spec.yaml", "--data", "text", "--out", out, "--steps", 12, *SHAPE, *more]


def run(capsys, *words) -> str:
    assert main([str(w) for w in words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refusal(capsys, *words) -> str:
    capsys.readouterr()
    assert main([str(w) for w in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [x for x in captured.err.splitlines() if x.startswith("kizzasi")]
    assert "Traceback" not in captured.err
    return line


def outcome(folder: Path) -> list[dict]:
    """The journal without what a clock says."""
    lines = (folder / "journal.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [{k: v for k, v in event.items() if k not in CLOCKED} for event in events]


def fill(disk: Path, room: int) -> Path:
    """Leave so many bytes free."""
    there = os.statvfs(disk)
    filler = disk / "filler"
    filler.write_bytes(b"\0" * max(0, there.f_bavail * there.f_frsize - room))
    return filler


def test_a_search_on_a_full_disk_goes_on_to_the_same_result(capsys, place, mounted):
    disk = mounted("-t", "tmpfs", "-o", "size=2m", "tmpfs")
    run(capsys, *search("whole"))
    best = (place / "whole" / "best" / "model.safetensors").read_bytes()
    for room in (8, 96):
        filler = fill(disk, room * KIB)
        line = refusal(capsys, *search(disk / "run"))
        assert "No space left on device" in line
        assert "make room" in line
        filler.unlink()
        run(capsys, *search(disk / "run", "--resume"))
        assert outcome(disk / "run") == outcome(place / "whole")
        assert (disk / "run" / "best" / "model.safetensors").read_bytes() == best
        assert not [p for p in disk.rglob("*") if "partial" in p.name or p.suffix == ".pt"]
        shutil.rmtree(disk / "run")


def test_a_training_on_a_full_disk_goes_on_to_the_same_weights(capsys, place, mounted):
    disk = mounted("-t", "tmpfs", "-o", "size=2m", "tmpfs")
    run(capsys, *train("whole"))
    for room in (4, 40):
        filler = fill(disk, room * KIB)
        line = refusal(capsys, *train(disk / "run", "--save-every", 4))
        assert "No space left on device" in line
        filler.unlink()
        again = ["--resume"] if (disk / "run" / "training.pt").exists() else []
        run(capsys, *train(disk / "run", *again))
        names = [Path(folder) / "model.safetensors" for folder in ("whole", disk / "run")]
        assert names[0].read_bytes() == names[1].read_bytes()
        assert not [p for p in disk.rglob("*") if "partial" in p.name]
        shutil.rmtree(disk / "run")


def test_a_read_only_disk_as_output_and_as_data(capsys, place, mounted, monkeypatch):
    Path("real").mkdir()
    run(capsys, *search("whole"))
    real, done = Training.run, []

    def stops(self, *args, **options):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(1)
        return real(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "run", stops)
        assert main([str(w) for w in search("real/run")]) == 130
    shutil.copy("text", "real/text")
    disk = mounted("--bind", "real")
    subprocess.run(["mount", "-o", "remount,ro,bind", str(disk)], check=True)
    before = {p: p.read_bytes() for p in disk.rglob("*") if p.is_file()}
    for words in (search(disk / "run", "--resume"), search(disk / "new"), train(disk / "new")):
        assert "Read-only file system" in refusal(capsys, *words)
    run(capsys, *search("of_read_only", data=disk / "text"))
    assert (place / "of_read_only/best/model.safetensors").read_bytes() == (
        place / "whole/best/model.safetensors"
    ).read_bytes()
    assert {p: p.read_bytes() for p in disk.rglob("*") if p.is_file()} == before
    subprocess.run(["mount", "-o", "remount,rw,bind", str(disk)], check=True)
    run(capsys, "search", "--resume", "--out", disk / "run", "--workers", 1)
    assert outcome(disk / "run") == outcome(place / "whole")
