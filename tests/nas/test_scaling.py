"""The winner at other sizes: stacked, widened, at carried-over rates, and what a law says of it."""

import json
import math
from typing import Any

import pytest
import torch
from small_search import write_text

from kizzasi.cli import main
from kizzasi.errors import CheckpointError, SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model, mup_spec, presets
from kizzasi.models.channels import MLPSpec, SwiGLUSpec
from kizzasi.models.mixers import AttentionSpec, GLASpec, MambaSpec, RWKV7Spec
from kizzasi.nas import MicroTrain, Xorshift64, spaces
from kizzasi.nas.evaluators.evaluator import Job
from kizzasi.nas.results.scaling_law import ScalingLaw
from kizzasi.nas.spaces.resize import at_width, stretched, widened
from kizzasi.train import Recipe, Training
from kizzasi.train.open import open_task

MIXED = ModelSpec(
    64,
    (
        BlockSpec(AttentionSpec(n_heads=4, n_kv_heads=2), SwiGLUSpec(hidden=96)),
        BlockSpec(GLASpec(n_heads=4, gate_rank=8), MLPSpec()),
        BlockSpec(RWKV7Spec(head_dim=16, decay_rank=12)),
    ),
    Tokens(256),
    tie_head=True,
)


def layers(spec: ModelSpec) -> Any:
    return spec.blocks


@pytest.mark.parametrize("name", ["hybrid", "moe"])
def test_every_ready_made_space_stretches(name):
    rng, space = Xorshift64(9), getattr(spaces, name)()
    for _ in range(2):
        spec = space.sample(rng).spec
        for times in (0.4, 6, 60):
            wanted = round(times * spec.cost(1).params)
            twin = stretched(spec, wanted)
            assert abs(math.log2(twin.cost(1).params / wanted)) < 0.35
            copies = len(twin.blocks) // len(spec.blocks)
            kinds = [b.mixer.kind for b in layers(spec)]
            assert [b.mixer.kind for b in layers(twin)] == kinds * copies
            assert copies == {0.4: 1, 6: 2, 60: 3}[times]


def test_heads_ranks_and_hidden_widths_grow_with_the_width():
    wide = widened(MIXED, 4 * MIXED.cost(1).params)
    one, two, three = layers(wide)
    ratio = wide.d_model / 64
    assert ratio > 1.7
    assert wide.d_model // one.mixer.n_heads == 16
    assert one.mixer.n_kv_heads * 2 == one.mixer.n_heads
    assert one.channel.hidden == round(96 * ratio)
    assert (two.mixer.n_heads, two.mixer.gate_rank) == (round(4 * ratio), round(8 * ratio))
    assert (three.mixer.head_dim, three.mixer.decay_rank) == (16, round(12 * ratio))
    assert build_model(wide, device="meta").n_params == wide.cost(1).params
    assert layers(at_width(MIXED, 128))[0].mixer.n_heads == 8
    with pytest.raises(SpecError, match="above 0"):
        stretched(MIXED, 0)
    with pytest.raises(SpecError, match="no valid model near 30 parameters"):
        stretched(MIXED, 30)


def test_a_preset_stretches_to_a_billion():
    spec = stretched(presets.at_size("mamba", 200_000, vocab_size=256), 10**9)
    assert abs(spec.cost(1).params / 10**9 - 1) < 0.02
    assert len(spec.blocks) == 24


def test_law_finds_what_made_the_points():
    sizes = [5e4, 1e5, 2e5] * 3
    rng = torch.Generator().manual_seed(2)
    noise = [2 ** (0.01 * torch.randn((), generator=rng).item()) for _ in sizes]
    law = ScalingLaw.fit(sizes, [40 * n**-0.2 * e for n, e in zip(sizes, noise, strict=True)])
    _, low, high = law.exponent()
    assert low < 0.2 < high
    assert high - low < 0.1
    _, least, most = law.predict(4e5, seeds=3)
    assert least < 40 * 4e5**-0.2 < most
    assert most / least < 1.1
    exact = ScalingLaw.fit([1, 2, 4], [8.0, 4.0, 2.0])
    assert exact.predict(8) == pytest.approx((1.0, 1.0, 1.0))
    with pytest.raises(SpecError, match="make no law"):
        ScalingLaw.fit([1, 1, 1], [1.0, 2.0, 3.0])


def test_interval_holds_as_often_as_it_says():
    rng, inside, covered = torch.Generator().manual_seed(1), 0, 0
    sizes = [1.0, 2.0, 4.0] * 3
    for _ in range(400):
        noise = torch.randn(12, generator=rng).mul(0.02).exp().tolist()
        law = ScalingLaw.fit(sizes, [3 * n**-0.1 * e for n, e in zip(sizes, noise, strict=False)])
        seen = sum(3 * 8**-0.1 * e for e in noise[9:]) / 3
        _, low, high = law.predict(8, seeds=3)
        inside += low < seen < high
        _, least, most = law.exponent()
        covered += least < 0.1 < most
    assert 0.92 < inside / 400 < 0.98
    assert 0.92 < covered / 400 < 0.98


def test_training_reads_the_base(tmp_path):
    task = open_task(write_text(tmp_path))
    base = ModelSpec(16, (BlockSpec(MambaSpec(d_state=4)),), Tokens(256), tie_head=True)
    wide = mup_spec(at_width(base, 32), base)
    recipe = Recipe(128, 16, 4, 1e-2)
    evaluator = MicroTrain(task, recipe, base=base)
    training = evaluator.training(Job(wide, 128, 0, {}, 128))
    rates = {
        name: peak
        for g, peak in zip(training.optimizer.param_groups, training.peaks, strict=True)
        for p in g["params"]
        for name, q in training.model.named_parameters()
        if p is q
    }
    assert rates["blocks.0.mixer.in_proj.weight"] == pytest.approx(5e-3)
    assert rates["stem.embedding.weight"] == pytest.approx(1e-2)
    training.run(64)
    training.save(tmp_path / "one.pt")
    alone = Training(build_model(wide), task, recipe, training.data_seed)
    with pytest.raises(CheckpointError, match="another training; base"):
        alone.restore(tmp_path / "one.pt")
    evaluator.training(Job(wide, 128, 0, {}, 128)).restore(tmp_path / "one.pt")


def test_scale_of_a_run(tmp_path, capsys):
    text, out = write_text(tmp_path), str(tmp_path / "run")
    small = [
        "--params",
        "20000",
        "--candidates",
        "1",
        "--rungs",
        "256",
        "--seq-len",
        "32",
        "--lrs",
        "1e-2",
    ]
    end = [
        "--final-seeds",
        "1",
        "--tokens",
        "256",
        "--workers",
        "1",
        "--space",
        "tiny",
        "--band",
        "0.6",
    ]
    assert (
        main(
            [
                "search",
                "--data",
                text,
                "--out",
                out,
                *small,
                *end,
                "--score-windows",
                "8",
                "--proxies",
            ]
        )
        == 0
    )
    capsys.readouterr()
    scale = [
        "scale",
        out,
        "--shares",
        "0.5",
        "1",
        "--seeds",
        "2",
        "--tokens",
        "512",
        "--check",
        "--json",
    ]
    assert main(scale) == 0
    found = json.loads(capsys.readouterr().out)
    half, whole, twice = found["sizes"]
    assert half["params"] < whole["params"] < twice["params"]
    assert (whole["tokens"], len(whole["scores"])) == (512, 2)
    assert twice["tokens"] == round(512 * twice["params"] / whole["params"])
    value, low, high = found["predicted"]
    assert low < value < high
    mean = sum(twice["scores"]) / 2
    assert found["held"] == (low <= mean <= high)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MicroTrain, "__call__", None)  # nothing is trained again
        assert main(scale) == 0
    assert main([*scale, "--out", out]) == 2
    capsys.readouterr()
    assert main(["scale", out]) == 0
    assert "expected" in capsys.readouterr().out
