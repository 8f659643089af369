"""The pipelines in examples/: each fits, prints, is scaled, trains, steps and draws."""

import json
import re
from pathlib import Path

import pytest
import torch

from kizzasi.cli import main
from kizzasi.models import build_model, presets
from kizzasi.models import load as load_model
from kizzasi.nas.pipelines import Pipeline, load, scaled, sketch, to_pipeline
from kizzasi.testing.mixer import fold
from kizzasi.testing.tolerance import assert_close
from kizzasi.train import Recipe, Training
from kizzasi.train.open import open_task

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_bytes(bytes(range(97, 123)) * 200)
    return open_task(path)


def test_there_are_a_dozen():
    assert len(EXAMPLES) >= 12


def test_the_table_of_the_page_is_of_these_files():
    page = (EXAMPLES[0].parents[1] / "docs" / "pipelines.md").read_text()
    named = re.findall(r"^\| (examples/\S+\.yaml) \| .*\d \|$", page, re.MULTILINE)
    assert sorted(named) == [f"examples/{path.name}" for path in EXAMPLES]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example(path, task):
    pipeline = Pipeline.from_file(path)
    assert to_pipeline(pipeline.spec).spec == pipeline.spec
    assert sketch(pipeline.spec).startswith("flowchart TD")
    twin, _ = scaled(load(path), 0.05 if pipeline.spec.d_model > 64 else 0.25)
    model = build_model(Pipeline.from_data(twin).spec, seed=0)
    training = Training(model, task, Recipe(2 * 64, seq_len=16, batch_size=4, lr=1e-3))
    assert training.run(2 * 64) is None
    assert 0 < training.curve[-1][1] < 14  # bits; a large vocabulary begins at its logarithm
    tokens = torch.arange(12)[None] + 97
    trained = model.double().eval()
    with torch.no_grad():
        assert_close(fold(trained, tokens)[0], trained(tokens).logits)


def test_a_sketch_shows_an_encoder_beside_the_line():
    """What it chooses goes into the body, and nothing goes from it to the head."""
    plain = presets.llama(16, 2, 2, 2, 24, 9)
    drawn = sketch(presets.free_transformer(plain, n_bits=3)).splitlines()
    named = {line[2:4]: line for line in drawn if line.startswith("  n") and chr(34) in line}
    (told,) = [line for line in drawn if "-. encoder .->" in line]
    encoder, body = told.split()[0], told.split()[-1]
    assert "latent n_bits 3 query learned" in "\n".join(drawn)
    assert named.keys() >= {encoder, body}
    head = next(name for name, line in named.items() if "head" in line.split("<br/>")[-1])
    assert f"  {body} --> {head}" in drawn
    assert not any(line.startswith(f"  {encoder} --> ") for line in drawn)


def test_the_best_pipeline_of_the_seed_is_a_preset():
    path = EXAMPLES[0].parent / "full_size" / "free_transformer_routed.yaml"
    assert Pipeline.from_file(path).spec == presets.free_transformer_routed()


def test_a_routed_free_transformer_is_searched_exported_and_writes(capsys, tmp_path):
    """The latent's path through every program: leak gate, score, export, texts of other bits."""
    small = EXAMPLES[0].parent / "free_transformer_small.yaml"
    data, run, out = tmp_path / "text.txt", tmp_path / "run", tmp_path / "mine"
    data.write_bytes(bytes(range(97, 123)) * 200)
    args = ["--asha-min", "2", "--asha-max", "2", "--pdh-stages", "--scale", "0.25"]
    args += ["--seq-len", "16", "--batch-size", "2", "--score-windows", "4"]
    assert main(["sweep", str(small), "--data", str(data), *args, "--out", str(run)]) == 0
    assert "free_transformer_small.yaml" in capsys.readouterr().out
    assert main(["export", str(run), "--out", str(out)]) == 0
    model = load_model(out)
    assert model.spec.encodes
    with torch.no_grad():
        for parameter in model.parameters():  # what bits change starts at zero
            parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(out, overwrite=True)
    capsys.readouterr()
    texts = {}
    for seed in (1, 2, 1):
        more = ["--prompt", "abc", "--tokens", "24", "--temperature", "0", "--seed", str(seed)]
        assert main(["generate", str(out), *more, "--json"]) == 0
        text = json.loads(capsys.readouterr().out)["text"]
        assert texts.setdefault(seed, text) == text
    assert texts[1] != texts[2]


def test_train_takes_the_recipe_of_a_pipeline(capsys, tmp_path):
    text = (EXAMPLES[0].parent / "plain.yaml").read_text()
    cfg = tmp_path / "mine.yaml"
    budget = (
        "ctx_len: 16, lr: 4e-3, wd: 0.2, clip: 0.5, budget: {tokens_per_step: 32, max_steps: 3}"
    )
    cfg.write_text(text.replace("ctx_len: 128, lr: 8e-3", budget))
    data = tmp_path / "text.txt"
    data.write_bytes(bytes(range(97, 123)) * 200)
    more = ["--data", str(data), "--out", str(tmp_path / "run"), "--json", "--lr", "1e-3"]
    assert main(["train", str(cfg), *more]) == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert recipe["horizon"] == 3 * 32
    named = ("seq_len", "batch_size", "lr", "weight_decay", "clip")
    assert [recipe[name] for name in named] == [16, 2, 1e-3, 0.2, 0.5]
    assert main(["info", str(cfg), "--mermaid"]) == 0
    assert "3 x attention n_heads 4 n_kv_heads 2" in capsys.readouterr().out
