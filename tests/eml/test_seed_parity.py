"""The seed's figures, to the digit: the golden file, the published gate and the comparison."""

import json
from pathlib import Path

import pytest
import torch

from kizzasi.eml import (
    EndToEndTrainConfig,
    ToyEmlAttention,
    compare_eml_vs_baseline,
    run_benchmark,
    run_benchmark_with_trials,
)
from kizzasi.eml.core.rng import Lcg
from kizzasi.eml.tasks import position_mean

GOLDEN = Path(__file__).parent.parent / "golden" / "eml_attention.jsonl"
CASES = [json.loads(line) for line in GOLDEN.read_text().splitlines()]
FORWARD = [case for case in CASES if case["case"] == "forward"]
TRAINING = [case for case in CASES if case["case"] == "train_mean_task"]


def shape(case):
    return tuple(case[key] for key in ("d_model", "d_k", "seq_len", "depth"))


@pytest.mark.parametrize("case", FORWARD, ids=lambda case: str(shape(case)))
def test_forward(case):
    model = ToyEmlAttention("t", *shape(case), rng="seed")
    x = torch.tensor(Lcg(0xCAFEF00D, "seed").sample(len(case["input"])), dtype=torch.float64)
    assert x.tolist() == case["input"]
    assert model.param_count == case["param_count"]
    assert model.q_model.params[:16].tolist() == case["init_params_first16"]
    total = sum(float(p.detach().sum()) for p in model.parameters())
    assert total == pytest.approx(case["init_params_sum"], rel=1e-12)
    close = {"rtol": 0, "atol": 1e-12}
    output, q = (torch.tensor(case[key], dtype=torch.float64) for key in ("output", "q"))
    torch.testing.assert_close(model(x).detach(), output, **close)
    torch.testing.assert_close(model.q_model(x).detach(), q, **close)


def recorded_model(d_model, d_k, seq_len, depth):
    model = ToyEmlAttention("t", d_model, d_k, seq_len, depth, rng="seed")
    lcg = Lcg(0xCAFEF00D, "seed")
    lcg.sample(seq_len * d_model)
    for _ in range(96):
        x = torch.tensor(lcg.sample(seq_len * d_model), dtype=torch.float64)
        model.record(x, position_mean(x.view(seq_len, d_model)).flatten())
    return model


@pytest.mark.parametrize("sizes", sorted({shape(case) for case in TRAINING}))
def test_training(sizes):
    model = recorded_model(*sizes)
    for case in [case for case in TRAINING if shape(case) == sizes]:
        config = EndToEndTrainConfig(case["trials"], step_final=0.01, convergence_mse=5e-2)
        final = model.train_end_to_end(config)
        assert model.training_rounds == case["round"]
        assert model.last_accepts == case["accepts"]
        assert final == pytest.approx(case["final_mse"], abs=1e-12)
        assert model.q_model.params[:16].tolist() == case["params_first16"]
        total = sum(float(p.detach().sum()) for p in model.parameters())
        assert total == pytest.approx(case["params_sum"], rel=1e-12)


def test_published_gate():
    result = run_benchmark_with_trials(4, 2, 2, 3, 15_000, rng="seed")
    assert result.param_count == 352
    assert result.phase2_training_rounds == 3
    assert round(100 * result.phase2_mse_reduction, 1) == 7.3
    assert not result.phase2_converged


def test_published_comparison():
    config = EndToEndTrainConfig(5000, step_final=0.01, convergence_mse=1e-3)
    result = compare_eml_vs_baseline(4, 2, 2, 3, config, 3, rng="seed")
    assert (result.eml_param_count, result.baseline_param_count) == (352, 148)
    figures = (result.eml_baseline_mse, result.eml_final_mse)
    assert [round(each, 4) for each in figures] == [1.4783, 1.5419]
    figures = (result.baseline_baseline_mse, result.baseline_final_mse)
    assert [round(each, 4) for each in figures] == [0.2331, 0.0550]


def test_repaired_numbers_learn():
    result = run_benchmark_with_trials(4, 2, 2, 3, 2500)
    assert result.phase2_converged
    assert result.phase2_mse_reduction > 0.9


def test_benchmark_phases_and_keys():
    result = run_benchmark(16, 8, 8, 3)
    points = result.phase4_scaling
    assert [(p.seq_len, p.d_model) for p in points] == [(4, 8), (4, 16), (8, 8), (8, 16)]
    assert points[-1].param_count == result.param_count == 36_112
    assert result.phase1_serialize_roundtrip
    assert result.phase3_inference_ns_p99 >= result.phase3_inference_ns_mean > 0
    assert list(json.loads(result.to_json())) == [
        "d_model", "seq_len", "d_k", "depth", "param_count", "phase1_warmup_ns",
        "phase1_serialize_roundtrip", "phase2_converged", "phase2_baseline_mse",
        "phase2_final_mse", "phase2_mse_reduction", "phase2_training_rounds",
        "phase3_inference_ns_mean", "phase3_inference_ns_p99", "phase4_scaling",
    ]  # fmt: skip
