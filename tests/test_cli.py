"""The program: every verb on real input, and every bad input of a user: one line, exit code 2."""

import json
import os
import subprocess
import sys

import pytest
import torch

from kizzasi.cli import VERBS, main
from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.channels import MLPSpec
from kizzasi.models.layers import LatentSpec
from kizzasi.models.mixers import AttentionSpec


@pytest.fixture
def spec_file(tmp_path):
    block = BlockSpec(AttentionSpec(n_heads=2), MLPSpec())
    ModelSpec(16, (block,), Tokens(256)).to_file(tmp_path / "spec.yaml")
    return tmp_path / "spec.yaml"


@pytest.fixture
def data(tmp_path):
    (tmp_path / "text").write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 200)
    return tmp_path / "text"


def output(capsys, *arguments) -> str:
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def refusal(capsys, *arguments) -> str:
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [x for x in captured.err.splitlines() if x.startswith("kizzasi ")]
    return line


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_and_the_common_options(capsys, verb):
    with pytest.raises(SystemExit) as exit_:
        main([verb, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("example:", "--seed", "--device", "--json"))


def test_doctor_names_every_op_and_tests_itself(capsys):
    found = json.loads(output(capsys, "doctor", "--json", "--no-speed"))
    known = {"attention", "eml_descent", "linear", "selective_scan", "wkv7"}
    assert known <= found["engines"].keys()
    assert {"eml_descent", "mamba"} <= found["self_test"].keys()
    assert set(found["engines"].values()) <= {"torch", "native"}
    assert found["kernels"].startswith("absent") or found["engines"]["selective_scan"] == "native"
    assert max(found["self_test"].values()) < 1e-9
    assert found["refused"] == {}


def test_doctor_says_why_an_engine_refuses(capsys, monkeypatch):
    from kizzasi.models.ops.selective_scan import SELECTIVE_SCAN

    def refuses(*given, **named):
        raise SpecError("engine: 'native' of selective_scan is 1.0e-01 away from its loop")

    monkeypatch.setattr(SELECTIVE_SCAN, "pick", lambda engine, device: refuses)
    text = output(capsys, "doctor", "--json", "--no-speed")
    assert "Infinity" not in text
    found = json.loads(text)
    assert found["self_test"]["mamba"] is None
    assert found["refused"].keys() == {"mamba"}
    told = output(capsys, "doctor", "--no-speed")
    assert "mamba: engine: 'native' of selective_scan is 1.0e-01 away" in told


def test_train_resume_generate_info_validate(capsys, tmp_path, spec_file, data):
    run = tmp_path / "run"
    options = ["--data", data, "--seq-len", 32, "--batch-size", 4, "--out", run, "--json"]
    trained = json.loads(output(capsys, "train", spec_file, "--steps", 60, *options))
    assert trained["score"] < 6
    assert trained["baselines"].keys() == {"unigram", "bigram", "xz"}
    assert sorted(p.name for p in run.iterdir()) == ["config.json", "model.safetensors"]
    longer = json.loads(output(capsys, "train", run, "--steps", 60, *options))
    assert longer["score"] < trained["score"]
    text = output(capsys, "generate", run, "--prompt", "the ", "--tokens", 12, "--temperature", 0)
    assert text.startswith("the ")
    made = json.loads(output(capsys, "generate", run, "--prompt", "fox", "--json"))
    assert made["text"].startswith("fox")
    assert made["tokens_per_second"] > 0
    info = json.loads(output(capsys, "info", run, "--json"))
    spec = ModelSpec.from_file(spec_file)
    assert info["total"] == spec.cost(1024)._asdict()
    assert "0 attention" in output(capsys, "info", spec_file)
    assert spec.digest in output(capsys, "validate", spec_file)


def test_an_interrupted_training_resumes(capsys, monkeypatch, tmp_path, spec_file, data):
    from kizzasi.train.trainer import Training

    options = ["--data", data, "--seq-len", 32, "--batch-size", 4, "--steps", 20, "--json"]
    whole = json.loads(output(capsys, "train", spec_file, *options, "--out", tmp_path / "whole"))
    real = Training._step

    def stop_at_step_7(self, *batch):
        if self.step == 7:
            raise KeyboardInterrupt
        return real(self, *batch)

    command = ["train", spec_file, *options, "--out", tmp_path / "parts"]
    monkeypatch.setattr(Training, "_step", stop_at_step_7)
    assert main([str(c) for c in command]) == 130
    assert "--resume continues" in capsys.readouterr().err
    monkeypatch.setattr(Training, "_step", real)
    assert "unfinished training; use --resume" in refusal(capsys, *command)
    resumed = json.loads(output(capsys, *command, "--resume"))
    assert resumed["score"] == whole["score"]


def test_search_prints_its_table(capsys, tmp_path, data):
    command = ["search", "--data", data, "--out", tmp_path / "run", "--workers", 1]
    command += ["--params", 100_000, "--band", 0.4, "--candidates", 4, "--best", 1, "--random", 1]
    command += ["--outside", 0, "--rungs", 256, 512, "--tokens", 512, "--seq-len", 32]
    command += ["--batch-size", 4, "--space", "families", "--searcher", "proxy"]
    command += ["--scheduler", "halving"]
    text = output(capsys, *command)
    assert "bits/byte" in text
    assert "report.html" in text
    result = json.loads(output(capsys, *command, "--resume", "--json"))
    assert result["best"] == str(tmp_path / "run" / "best")
    assert "holds a run already" in refusal(capsys, *command)


def test_users_errors_are_one_line_with_path_and_remedy(capsys, tmp_path, spec_file, data):
    def edited(name, **changes):
        spec = ModelSpec.from_file(spec_file).to_dict()
        (tmp_path / name).write_text(json.dumps({**spec, **changes}))
        return tmp_path / name

    misspelt = edited("a.json", d_modle=3)
    assert "a.json: d_modle: unknown; did you mean d_model?" in refusal(capsys, "info", misspelt)
    uneven = edited("b.json", d_model=15)
    assert "blocks[0].mixer" in refusal(capsys, "validate", uneven)
    huge = edited("c.json", d_model=4 * 10**5)
    out = ["--out", tmp_path / "out"]
    assert "a training needs" in refusal(capsys, "train", huge, "--data", data, *out)
    small = edited("d.json", stem={"kind": "tokens", "vocab_size": 100})
    assert "vocab_size=100" in refusal(capsys, "train", small, "--data", data, *out)
    assert "nowhere" in refusal(capsys, "train", spec_file, "--data", tmp_path / "nowhere", *out)
    (tmp_path / "empty").touch()
    assert "empty" in refusal(capsys, "search", "--data", tmp_path / "empty", *out)
    assert "no config.json" in refusal(capsys, "generate", tmp_path / "none")
    assert "no.yaml" in refusal(capsys, "validate", tmp_path / "no.yaml")
    (tmp_path / "file").touch()
    blocked = ["--out", tmp_path / "file" / "run"]
    assert "file" in refusal(capsys, "search", "--data", data, *blocked)
    assert "--device nope" in refusal(capsys, "generate", tmp_path, "--device", "nope")
    build_model(ModelSpec.from_file(spec_file)).save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "model.safetensors" in refusal(capsys, "generate", tmp_path / "model")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_run_folder(capsys, tmp_path, data):
    (tmp_path / "locked").mkdir(mode=0o500)
    line = refusal(capsys, "search", "--data", data, "--out", tmp_path / "locked" / "run")
    assert "locked" in line


def test_scripts_are_the_same_programs(tmp_path):
    for verb in ("search", "train"):
        script = os.path.join(os.path.dirname(__file__), "..", "scripts", f"{verb}.py")
        done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
        assert done.returncode == 0
        assert f"kizzasi {verb}" in done.stdout


def test_info_and_validate_read_foreign_checkpoints_without_their_weights(capsys, tmp_path):
    from kizzasi.models import presets
    from kizzasi.models.checkpoints import save, spec_of

    model = build_model(presets.llama(16, 2, 2, 2, 24, 32))
    for format in ("kizzasi", "llama"):
        folder = tmp_path / format
        save(model, folder, format)
        assert spec_of(folder).cost(1).params == model.n_params
        told = json.loads(output(capsys, "info", folder, "--json"))
        assert told["total"]["params"] == model.n_params
        output(capsys, "validate", folder)
    assert "no config.json" in refusal(capsys, "info", tmp_path / "none")


def test_train_goes_on_from_a_single_file_of_weights(capsys, tmp_path, data):
    from kizzasi.models import load, presets
    from kizzasi.models.checkpoints import save

    model = build_model(presets.rwkv4(32, 1, 256), seed=5)
    save(model, tmp_path / "theirs", "rwkv_pth")
    options = ["--data", data, "--seq-len", 16, "--batch-size", 2, "--steps", 1, "--lr", "1e-9"]
    trained = ["train", tmp_path / "theirs" / "model.pth", *options, "--out", tmp_path / "out"]
    assert "--save-every 0: must be at least 1" in refusal(capsys, *trained, "--save-every", 0)
    output(capsys, *trained)
    after = load(tmp_path / "out").state_dict()
    for name, before in model.state_dict().items():
        torch.testing.assert_close(after[name], before, atol=1e-6, rtol=0)


def test_info_asks_the_leak_gate_of_checkpoints_and_specs(capsys, tmp_path, spec_file):
    assert json.loads(output(capsys, "info", spec_file, "--leak", "--json"))["leak"] is None
    sees_all = BlockSpec(AttentionSpec(n_heads=2, causal=False))
    build_model(ModelSpec(16, (sees_all,), Tokens(9))).save_pretrained(tmp_path / "encoder")
    assert "outputs depend on later inputs" in output(
        capsys, "info", tmp_path / "encoder", "--leak"
    )


def test_programs_run_on_the_engine_that_they_are_told(
    capsys, spec_file, data, tmp_path, monkeypatch
):
    import kizzasi.models as models

    engines = []
    for name in ("build_model", "load"):
        plain = getattr(models, name)

        def noted(*args, _plain=plain, **kwargs):
            engines.append(kwargs["engine"])
            return _plain(*args, **kwargs)

        monkeypatch.setattr(models, name, noted)
    shape = ["--seq-len", 16, "--batch-size", 2, "--engine", "reference"]
    trained = tmp_path / "trained"
    output(capsys, "train", spec_file, "--data", data, "--out", trained, "--steps", 2, *shape)
    output(capsys, "score", trained, "--data", data, "--score-windows", 2, *shape)
    output(capsys, "generate", trained, "--tokens", 2, "--engine", "reference")
    assert engines == ["reference"] * 3


def test_a_score_pays_for_latent_bits_as_a_training_does(capsys, data, tmp_path):
    heads = BlockSpec(AttentionSpec(n_heads=2))
    sees_all = BlockSpec(AttentionSpec(n_heads=2, causal=False))
    spec = ModelSpec(16, (LatentSpec((heads,), (sees_all,), n_bits=3),), Tokens(256))
    spec.to_file(tmp_path / "latent.yaml")
    shape = ["--seq-len", 16, "--batch-size", 2, "--score-windows", 4, "--json"]
    run = tmp_path / "run"
    told = output(
        capsys,
        "train",
        tmp_path / "latent.yaml",
        "--data",
        data,
        "--out",
        run,
        "--steps",
        3,
        *shape,
    )
    again = output(capsys, "score", run, "--data", data, *shape)
    assert json.loads(told)["score"] == json.loads(again)["score"]
