"""`kizzasi generate`: where prompts come from, seeds, endings, and what a shell may do to it."""

import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from kizzasi.cli import main
from kizzasi.models import BlockSpec, ModelSpec, SequenceModel, Tokens, build_model, load
from kizzasi.models.channels import MLPSpec
from kizzasi.models.mixers import AttentionSpec

PROGRAM = [sys.executable, "-m", "kizzasi.cli"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that says every byte now and then."""
    block = BlockSpec(AttentionSpec(n_heads=2), MLPSpec())
    model = build_model(ModelSpec(16, (block,), Tokens(256)), seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    path = tmp_path_factory.mktemp("cli") / "model"
    model.save_pretrained(path)
    return path


def run(capsys, *arguments, code=0):
    assert main(["generate", *(str(a) for a in arguments)]) == code
    return capsys.readouterr()


def test_a_seed_is_new_each_time_unless_given_and_is_said(capsys, folder):
    first, second = (run(capsys, folder, "--tokens", 30) for _ in range(2))
    assert first.out != second.out
    seed = re.fullmatch(r"seed (\d+) \(--seed \1 gives this text again\)\n", first.err).group(1)
    again = run(capsys, folder, "--tokens", 30, "--seed", seed)
    assert (again.out, again.err) == (first.out, "")
    told = json.loads(run(capsys, folder, "--tokens", 30, "--json").out)
    assert (
        json.loads(run(capsys, folder, "--tokens", 30, "--json", "--seed", told["seed"]).out)[
            "text"
        ]
        == told["text"]
    )
    assert run(capsys, folder, "--tokens", 3, "--temperature", 0).err == ""


def test_prompts_come_from_stdin_and_files(capsys, monkeypatch, tmp_path, folder):
    (tmp_path / "prompt").write_text("päper\n")
    greedy = ["--tokens", 5, "--temperature", 0]
    wanted = run(capsys, folder, "--prompt", "päper\n", *greedy).out
    assert wanted.startswith("päper\n")
    assert run(capsys, folder, "--prompt-file", tmp_path / "prompt", *greedy).out == wanted
    stdin = io.TextIOWrapper(io.BytesIO("päper\n".encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run(capsys, folder, "--prompt", "-", *greedy).out == wanted


def test_prompts_that_are_no_text_are_refused_in_one_line(capsys, tmp_path, folder):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty").touch()
    for arguments, message in (
        (["--prompt", "caf\udce9"], "--prompt: not UTF-8 from byte 3 on; convert it"),
        (["--prompt-file", tmp_path / "latin"], "latin: not UTF-8 from byte 3 on"),
        (["--prompt-file", tmp_path / "empty"], "empty; give at least one character"),
        (["--prompt-file", tmp_path / "none"], "none: No such file"),
        (["--prompt", ""], "--prompt: empty"),
        (["--temperature", -1], "kizzasi generate: temperature: must be at least 0"),
        (["--stop", ""], "stop: must be one or more texts"),
    ):
        told = run(capsys, folder, "--seed", 0, *arguments, code=2)
        assert message in told.err
        assert told.err.count("\n") == 1
        assert told.out == ""


def test_any_of_several_stops_ends_the_text_and_beams_are_greedy_by_themselves(capsys, folder):
    command = [folder, "--prompt", "a", "--tokens", 40, "--seed", 3]
    free = run(capsys, *command).out[1:-1]
    stops = [free[9:11], free[4:6]]
    end = min(free.index(stop) for stop in stops)
    flags = [flag for stop in stops for flag in ("--stop", stop)]
    assert run(capsys, *command, *flags).out[1:-1] == free[:end]
    beams = ["--prompt", "a", "--tokens", 12, "--beams", 3]
    likeliest = run(capsys, folder, *beams).out[1:-1]
    cut = run(capsys, folder, *beams, "--stop", likeliest[3]).out[1:-1]
    assert cut == likeliest[: likeliest.index(likeliest[3])]


def test_a_searchs_folder_gives_its_best_and_a_spec_says_it_has_no_weights(
    capsys, tmp_path, folder
):
    (tmp_path / "best").symlink_to(folder)
    greedy = ["--prompt", "a", "--tokens", 5, "--temperature", 0]
    told = run(capsys, tmp_path, *greedy)
    assert told.out == run(capsys, folder, *greedy).out
    assert told.err == f"{tmp_path}: a search; taking its best model, {tmp_path / 'best'}\n"
    (tmp_path / "spec.yaml").touch()
    refused = run(capsys, tmp_path / "spec.yaml", code=2).err
    assert "spec.yaml: a spec, which has no weights; train it first (kizzasi train" in refused


def test_the_cache_is_a_flag(capsys, tmp_path, folder):
    command = ["--prompt", "abc", "--tokens", 40, "--seed", 3]
    plain = run(capsys, folder, *command).out
    assert run(capsys, folder, *command, "--cache-window", 100).out == plain
    flags = ["--cache", "nf4", "--cache-window", 8, "--cache-first", 2]
    coded = run(capsys, folder, *command, *flags).out
    load(folder).with_cache("nf4", window=8, n_global=2).save_pretrained(tmp_path / "coded")
    assert coded == run(capsys, tmp_path / "coded", *command).out != plain


def test_a_terminal_that_cannot_show_a_letter_is_no_failure(folder):
    arguments = ["generate", str(folder), "--prompt", "é", "--tokens", "20", "--seed", "1"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(PROGRAM + arguments, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("?")


def test_a_closed_pipe_ends_it_quietly(folder):
    arguments = ["generate", str(folder), "--prompt", "a", "--tokens", "500", "--seed", "1"]
    process = subprocess.Popen(PROGRAM + arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(1) == b"a"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


def test_ctrl_c_says_what_is_true(capsys, monkeypatch, folder):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(SequenceModel, "generate", interrupt)
    told = run(capsys, folder, "--seed", 0, code=130)
    assert told.err == "\nkizzasi generate: stopped\n"
