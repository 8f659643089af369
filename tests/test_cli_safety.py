"""What a person types: nothing is lost, nothing is guessed, and every error is one line."""

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kizzasi
from kizzasi import files
from kizzasi.cli import VERBS, main
from kizzasi.cli.errors import line_of, shown
from kizzasi.files import only_writer
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model, load
from kizzasi.models.mixers import AttentionSpec
from kizzasi.nas.study.journal import read_events
from kizzasi.train.trainer import Training

SPEC = ModelSpec(8, (BlockSpec(AttentionSpec(n_heads=2)),), Tokens(256))
SHAPE = ["--seq-len", 16, "--batch-size", 2]
SEARCH = ["--searcher", "random", "--params", 8000, "--band", 0.6, "--candidates", 2]
SEARCH += ["--rungs", 64, 128, "--tokens", 128, "--score-windows", 4, "--proxies", "--workers", 1]
SEARCH += ["--final-seeds", 1, "--lrs", "3e-3", *SHAPE]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with a spec, a space and two texts, and we are in it."""
    monkeypatch.chdir(tmp_path)
    SPEC.to_file(tmp_path / "spec.yaml")
    block = {"mixer": {"kind": "attention", "n_heads": {"choice": [1, 2]}}}
    space = {"d_model": 16, "stem": {"kind": "tokens", "vocab_size": 256}, "tie_head": True}
    space["blocks"] = {"repeat": block, "low": 1, "high": 2}
    (tmp_path / "space.json").write_text(json.dumps(space))
    for name, text in (("text", "line %d of a small text\n"), ("other", "%d other\n")):
        (tmp_path / name).write_text("".join(text % (i * i % 997) for i in range(300)))
    return tmp_path


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


def train(*more, out="run", steps=12):
    return ["train", "spec.yaml", "--data", "text", "--out", out, "--steps", steps, *SHAPE, *more]


def stop_at(monkeypatch, step: int):
    real = Training._step

    def stopping(self, *batch):
        if self.step == step:
            raise KeyboardInterrupt
        return real(self, *batch)

    monkeypatch.setattr(Training, "_step", stopping)
    return lambda: monkeypatch.setattr(Training, "_step", real)


@pytest.fixture
def interrupted(place, monkeypatch, capsys) -> Path:
    """A training that was stopped at step 5 of 12."""
    undo = stop_at(monkeypatch, 5)
    assert main([str(w) for w in train()]) == 130
    undo()
    assert os.listdir(place / "run") == ["training.pt"]
    return place / "run"


def test_resume_needs_no_other_flag_and_equals_the_whole(capsys, interrupted):
    whole = json.loads(run(capsys, *train("--json", out="whole")))
    os.rename(interrupted.parent / "spec.yaml", interrupted.parent / "moved.yaml")
    resumed = json.loads(run(capsys, "train", "--resume", "--out", "run", "--json"))
    assert {**resumed, "folder": ""} == {**whole, "folder": ""}
    weights = [
        (interrupted.parent / d / "model.safetensors").read_bytes() for d in ("run", "whole")
    ]
    assert weights[0] == weights[1]
    assert "nothing to resume" in refusal(capsys, "train", "--resume", "--out", "run")
    assert "nothing to resume" in refusal(capsys, "train", "--resume", "--out", "nowhere")
    assert "give a spec" in refusal(capsys, "train", "--out", "nowhere")
    assert not (interrupted.parent / "nowhere").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--data", "other"], "data: "),
        (["--lr", 0.1], "lr: 0.003 then, 0.1 now"),
        (["--seq-len", 8, "--batch-size", 4], "seq_len: 16 then, 8 now"),
        (["--seed", 7], "data_seed: "),
        (["--optimizer", "muon"], "optimizer: adamw then, muon now"),
        (["--steps", 3], "horizon: 384 then, 96 now"),
    ],
)
def test_resume_refuses_another_training_and_keeps_it(capsys, interrupted, change, told):
    before = (interrupted / "training.pt").read_bytes()
    line = refusal(capsys, "train", "--resume", "--out", "run", *change)
    assert "it is another training" in line
    assert told in line
    assert (interrupted / "training.pt").read_bytes() == before


@pytest.mark.parametrize("change", [{"dropout": 0.5}, {"blocks": (BlockSpec(AttentionSpec(4)),)}])
def test_resume_refuses_another_model_also_of_equal_shapes(capsys, interrupted, change):
    SPEC.replace(**change).to_file("changed.yaml")
    line = refusal(capsys, "train", "changed.yaml", "--resume", "--out", "run")
    assert "it is another training; spec: " in line


def test_more_steps_are_taken_and_said(capsys, interrupted):
    assert main(["train", "--resume", "--out", "run", "--steps", "14"]) == 0
    assert "more tokens: 448 instead of 384" in capsys.readouterr().err


def test_a_moved_text_is_the_same_training(capsys, interrupted):
    os.rename("text", "moved")
    assert "text" in refusal(capsys, "train", "--resume", "--out", "run")
    run(capsys, "train", "--resume", "--out", "run", "--data", "moved")


def test_a_finished_model_is_replaced_only_when_asked(capsys, place):
    run(capsys, *train(steps=2))
    before = (place / "run" / "model.safetensors").read_bytes()
    (place / "run" / "README.md").write_text("mine")
    assert "--overwrite" in refusal(capsys, *train(steps=3))
    shutil.copytree("run", "copy")
    assert "overwrite" in refusal(capsys, "convert", "run", "copy")
    assert (place / "run" / "model.safetensors").read_bytes() == before
    run(capsys, *train("--overwrite", steps=3))
    assert (place / "run" / "model.safetensors").read_bytes() != before
    assert (place / "run" / "README.md").read_text() == "mine"
    assert "give --data" in refusal(capsys, "train", "run", "--steps", 1, "--out", "run")


def test_one_writer_at_a_time(capsys, interrupted):
    before = (interrupted / "training.pt").read_bytes()
    with only_writer(interrupted):
        assert "another process is training" in refusal(capsys, *train("--resume"))
    assert (interrupted / "training.pt").read_bytes() == before
    run(capsys, *train("--resume"))


def test_links_in_a_training_are_refused_and_partial_ones_not_followed(capsys, place):
    (place / "mine").write_text("precious")
    os.mkdir("run")
    os.symlink(place / "mine", place / "run" / "training.pt")
    assert "a link" in refusal(capsys, *train("--resume"))
    os.unlink(place / "run" / "training.pt")
    os.symlink(place / "mine", place / "run" / "training.partial")
    run(capsys, *train("--save-every", 1, steps=2))
    assert (place / "mine").read_text() == "precious"


@pytest.mark.parametrize("room", [0, 2_000, 30_000])
def test_a_training_on_a_full_disk_goes_on_once_there_is_room(capsys, place, monkeypatch, room):
    whole = json.loads(run(capsys, *train("--json", out="whole")))
    left, real = [room], files._Watched.write

    def write(self, data):
        left[0] -= memoryview(data).nbytes
        if left[0] < 0:
            self.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise self.error
        return real(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(files._Watched, "write", write)
        line = refusal(capsys, *train("--save-every", 4))
    assert "No space left on device" in line
    assert "make room" in line
    assert not list(place.rglob("*.partial"))
    again = ["--resume"] if (place / "run" / "training.pt").exists() else []
    done = json.loads(run(capsys, *train(*again, "--json")))
    assert (done["score"], done["curve"]) == (whole["score"], whole["curve"])


def test_everything_is_checked_before_the_first_step(capsys, place, monkeypatch):
    monkeypatch.setattr(Training, "run", pytest.fail)
    Path("short").write_bytes(b"x" * 301)
    line = refusal(capsys, "train", "spec.yaml", "--data", "short", "--seq-len", 64, "--out", "a/b")
    assert "32 bytes" in line
    assert "seq_len=64" in line
    Path("file").touch()
    assert "file" in refusal(capsys, *train(out="file/run"))
    assert "seq_len=64" in refusal(
        capsys, "search", "--data", "short", "--out", "a/b", *SEARCH, "--seq-len", 64,
        "--batch-size", 1,
    )  # fmt: skip
    assert "params" in refusal(
        capsys, "search", "--data", "text", "--space", "space.json", "--out", "a/b", *SEARCH,
        "--params", 30, "--band", 1e-9,
    )  # fmt: skip
    spent = ["--space", "space.json", *SEARCH, "--search-tokens", 64, "--scheduler", "asha"]
    for more in ([], ["--dry-run"]):
        line = refusal(capsys, "search", "--data", "text", "--out", "a/b", *spent, *more)
        assert "search_tokens: 64 leave nothing" in line
    assert "lr: inf" in refusal(capsys, *train("--lr", "inf", out="a/b"))
    assert not (place / "a").exists()


def test_the_model_is_saved_before_it_is_scored(capsys, place, monkeypatch):
    def stopped(self, split="valid"):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "score", stopped)
        assert main([str(w) for w in train(steps=2)]) == 130
    load("run")
    told = json.loads(run(capsys, "score", "run", "--data", "text", *SHAPE, "--json"))
    again = json.loads(run(capsys, *train("--json", out="again", steps=2)))
    assert told["score"] == again["score"]
    assert told["baselines"] == again["baselines"]
    few = json.loads(
        run(capsys, "score", "run", "--data", "text", *SHAPE, "--score-windows", 3, "--json")
    )
    assert few["windows"] == 3
    assert "bits/byte on test" in run(capsys, "score", "run", "--data", "text", "--split", "test")


def test_a_runs_own_folder_is_never_its_data(capsys, place):
    os.mkdir("notes")
    shutil.copy("text", "notes/text")
    out = Path("notes") / "run"
    command = ["search", "--data", "notes", "--space", "space.json", "--out", out, *SEARCH]
    run(capsys, *command)
    digest = read_events(out / "journal.jsonl")[0]["data"]["digest"]
    run(capsys, *command, "--resume")
    run(capsys, *train("--data", "notes", out="notes/model", steps=1))
    told = json.loads(run(capsys, "score", "notes/run", "--data", "notes/text", *SHAPE, "--json"))
    assert told["digest"] == digest
    assert "one folder" in refusal(capsys, *train("--data", "notes", out="notes"))


def test_a_search_resumes_without_flags_and_its_card_gives_its_number(capsys, place):
    command = ["search", "--data", "text", "--space", "space.json", "--out", "found", *SEARCH]
    before = json.loads(run(capsys, *command, "--json"))
    os.rename("space.json", "gone.json")
    after = json.loads(run(capsys, "search", "--resume", "--out", "found", "--json"))
    assert after == before
    grown = json.loads(
        run(capsys, "search", "--resume", "--out", "found", "--final-seeds", 2, "--json")
    )
    assert [len(f["trials"]) for f in grown["finalists"]] == [2, 2]
    assert "nothing to resume" in refusal(capsys, "search", "--resume", "--out", "nowhere")
    run(capsys, "export", "found", "--out", "mine")
    card = Path("mine/README.md").read_text()
    (number,) = {
        line.rpartition(": ")[2] for line in card.splitlines() if line.startswith("# these weights")
        and "further" not in line
    }  # fmt: skip
    lines = [line for line in card.splitlines() if line.startswith("kizzasi ")]
    data = str(place / "text")
    os.chdir("mine")
    score, anew = (shlex.split(line.replace("--data text", f"--data {data}")) for line in lines[:2])
    told = json.loads(run(capsys, *score[1:], "--json"))
    assert f"{told['score']:.4f} bits/byte" == number
    told = json.loads(run(capsys, *anew[1:], "--json"))
    assert f"{told['score']:.4f} bits/byte" == number
    assert torch.__version__ in card
    os.chdir(place)
    for verb in ("info", "validate"):
        run(capsys, verb, "found")
    run(capsys, "convert", "found", "converted")
    assert "version of torch" in Path("found/report.md").read_text().replace("\\", "")


def test_a_dry_run_writes_nothing(capsys, place):
    words = ["search", "--data", "text", "--space", "space.json", *SEARCH, "--out", "x/y"]
    assert main([str(w) for w in (*words, "--workers", 999, "--dry-run")]) == 0
    text, said = capsys.readouterr()
    assert all(word in text for word in ("trainings", "tokens", "minutes", "nothing was written"))
    assert "999 workers share" in said
    assert not Path("x").exists()


def test_no_verb_version_and_typos(capsys):
    assert "give a verb" in refusal(capsys)
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert kizzasi.__version__ in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)
    code = "import sys, kizzasi.cli.parsing as p; p.overview(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)  # help comes at once
    assert "did you mean search?" in refusal(capsys, "searhc")
    assert "did you mean --params?" in refusal(capsys, "search", "--parms", 3)
    assert "did you mean regularized?" in refusal(capsys, "search", "--searcher", "regularised")
    assert "kizzasi train: " in refusal(capsys, "train", "a.yaml", "--steps", "many")
    assert "--seed" in refusal(capsys, "--seed", 3)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**70, "x", "1" * 5000])
def test_seeds_out_of_range_are_refused(capsys, place, seed):
    for verb in (["train", "spec.yaml"], ["generate", "x"], ["search"]):
        assert "--seed" in refusal(capsys, *verb, f"--seed={seed}")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "not enough memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: ..\nx"),
            "memory",
        ),
        (RecursionError("maximum"), "nested too deeply"),
        (OverflowError("int too large"), "too large"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "no"), "encoding"),
        (type("PanicException", (BaseException,), {})("at x.rs"), "gave up on the input"),
        (OSError(errno.ENOSPC, "No space left", "a\x1b[2J\nb"), "make room"),
    ],
)
def test_every_error_is_one_line_without_control_characters(
    capsys, monkeypatch, place, error, told
):
    def fails(args):
        raise error

    monkeypatch.setattr("kizzasi.cli.info.run", fails)
    line = refusal(capsys, "info", "spec.yaml")
    assert told in line
    assert line.isprintable()


def test_a_fault_of_ours_says_where_and_has_another_code(capsys, monkeypatch, place):
    monkeypatch.setattr("kizzasi.cli.info.run", lambda args: 1 / 0)
    assert main(["info", "spec.yaml"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "fault of the program at test_cli_safety.py" in line
    assert shown("a\x1b[31m\u202e\udcff\n b") == "a\ufffd[31m\ufffd\ufffd b"
    assert len(line_of(ValueError("x" * 10_000))[0]) <= 700


def test_a_broken_pipe_and_a_full_device(place):
    build_model(SPEC).save_pretrained("model")
    info = f"{sys.executable} -m kizzasi.cli info model"
    shell = f"{info} > /dev/full; echo $?; {info} | true; echo ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        ["bash", "-c", shell], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.split() == ["2", "141"]
    told = "kizzasi info: No space left on device; make room and try again"
    assert done.stderr.splitlines() == [told]


@pytest.fixture
def read_only(monkeypatch):
    """Nothing can be written, as on a disk that is mounted so."""

    def refused(path, *_more, **_options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def opened(path, flags, *more, **options):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path) != os.devnull:
            refused(path)
        return real(path, flags, *more, **options)

    real = os.open
    return lambda: (
        monkeypatch.setattr(os, "open", opened),
        monkeypatch.setattr(os, "mkdir", refused),
    )


def test_a_read_only_disk_loses_nothing_and_shows_what_is_there(capsys, place, read_only):
    command = ["search", "--data", "text", "--space", "space.json", *SEARCH, "--out"]
    run(capsys, *command, "found")
    run(capsys, *train(steps=1))
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    read_only()
    assert "Read-only file system" in refusal(capsys, *command, "new")
    assert "Read-only file system" in refusal(capsys, "search", "--resume", "--out", "found")
    assert "Read-only file system" in refusal(capsys, *train(out="new"))
    assert "Read-only file system" in refusal(capsys, *train("--overwrite"))
    assert "Read-only file system" in refusal(capsys, "convert", "run", "new")
    assert "Read-only file system" in refusal(capsys, "export", "found", "--out", "new")
    assert "complete" in run(capsys, "report", "found")
    assert "complete" in run(capsys, "report", "found", "--watch", 0.1)
    for words in (["info", "found"], ["generate", "found", "--tokens", 2], ["validate", "found"]):
        run(capsys, *words)
    run(capsys, "score", "run", "--data", "text", *SHAPE, "--score-windows", 2)
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("verb", ["report", "info", "validate", "generate", "export"])
def test_a_zero_byte_is_in_no_name(capsys, place, verb):
    assert "a\ufffdb" in refusal(capsys, verb, "a\0b")
    assert "a\ufffdb" in refusal(capsys, verb, "a\0b.yaml")


def test_numbers_that_would_never_end_are_refused(capsys, place):
    build_model(SPEC).save_pretrained("model")
    for words in (["--beams", 10**6], ["--tokens", 10**30], ["--device", "meta"], ["--top-p", 2]):
        assert words[0].strip("-").replace("-", "_") in refusal(
            capsys, "generate", "model", *words
        ).replace("-", "_")
    assert "--score-windows" in refusal(
        capsys, "score", "model", "--data", "text", "--score-windows", -1
    )
