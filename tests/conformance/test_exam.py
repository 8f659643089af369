"""The exam that every mixer and channel sits, in float64 under the one tolerance table.

A part whose spec says that it is not causal has no state and no step: it is asked for neither, and
must refuse both.
"""

import json

import pytest
import torch
from cases import (
    CAUSAL,
    CHANNELS,
    LAYERS,
    MIXERS,
    causal_models,
    devices,
    every_model,
    exam_of,
    make,
    model_spec,
    other_parts,
    tokens,
)
from tolerance import assert_close_in
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kizzasi.errors import SpecError
from kizzasi.models import (
    ModelSpec,
    build_model,
    list_channels,
    list_mixers,
)
from kizzasi.models.mixer import Mixer
from kizzasi.testing import mixer as exam
from kizzasi.testing.mixer import fold, gradients

LENGTHS = (1, 7, 64, 100)


def test_every_registered_kind_is_examined():
    assert {name.split("-")[0] for name in MIXERS} == set(list_mixers())
    assert {name.split("-")[0] for name in CHANNELS} == set(list_channels())


@devices
@causal_models
@pytest.mark.parametrize("length", [1, 7, 65])
def test_forward_equals_fold_of_step(name, length, device):
    exam.steps_equal_one_call(exam_of(name, device), length)


@devices
@every_model
@pytest.mark.parametrize("length", LENGTHS)
def test_reference_equals_torch_engine(name, length, device):
    exam.engines_agree(exam_of(name, device), length)


@devices
@causal_models
@pytest.mark.parametrize("splits", [(8, 8, 5), (1, 20), (20, 1), (7, 14)])
def test_any_split_with_the_state_carried_equals_one_call(name, splits, device):
    exam.splits_equal_one_call(exam_of(name, device), splits)


@devices
@causal_models
def test_causality(name, device):
    exam.is_causal(exam_of(name, device))


@devices
@other_parts
def test_what_is_not_causal_reads_later_tokens_and_refuses_a_state(name, device):
    exam.reads_later_tokens(exam_of(name, device))


@devices
@every_model
def test_batch_rows_are_independent(name, device):
    exam.rows_are_independent(exam_of(name, device))


@devices
@every_model
@pytest.mark.parametrize("cut", [None, 6, 9])
def test_packed_equals_separate(name, cut, device):
    exam.packed_equals_separate(exam_of(name, device), cut)


@devices
@every_model
@pytest.mark.parametrize("splits", [(12,), (4, 4, 4), (1, 11)])
def test_left_padded_equals_unpadded(name, splits, device):
    exam.padded_equals_unpadded(exam_of(name, device), splits)


@every_model
def test_padding_on_the_right_is_refused(name):
    exam.padding_on_the_right_is_refused(exam_of(name))


@causal_models
def test_padding_after_a_state_leaves_it_alone(name):
    exam.padding_after_a_state_leaves_it_alone(exam_of(name))


@devices
@causal_models
def test_state_is_a_value(name, device):
    exam.state_is_a_value(exam_of(name, device))


@every_model
def test_saved_and_loaded_gives_the_same_logits(name, tmp_path):
    exam.comes_back_from_files(exam_of(name), tmp_path)


@every_model
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 7), (1, 100)])
def test_analytic_cost_equals_the_measured_one(name, batch, length):
    exam.cost_is_measured(exam_of(name), batch, length)


@every_model
def test_initialisation_sets_everything_from_the_seed_alone(name):
    exam.the_seed_sets_everything(exam_of(name))


def noisy(model, dtype):
    """The model with relative errors of the dtype's size in all weights."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            error = 2 * torch.rand(p.shape, generator=generator, dtype=torch.float64) - 1
            p.mul_(1 + torch.finfo(dtype).eps * error.to(p.device))
    return model


@devices
@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(name, dtype, device):
    """Low-precision models and autocast, forward, step and gradients: they err no more than the
    exact model with weights rounded at random; the declared parameters keep float32."""
    x = tokens(2, 33, device=device)

    def run(model, autocast=False):
        with torch.autocast(device, dtype=dtype, enabled=autocast):
            logits = model(x).logits
            stepped = fold(model, x[:, :12])[0] if CAUSAL.get(name, True) else logits
        weights = torch.linspace(-1, 1, logits.numel(), device=device).view_as(logits)
        return logits, stepped, gradients(model, (logits.double() * weights).sum())

    exact = run(make(name, device=device))
    allowed = run(noisy(make(name, device=device), dtype))
    low = make(name, device=device, dtype=torch.float32).to(dtype)
    for prefix, module in low.named_modules():
        for key in getattr(module, "float32_parameters", ()):
            parameter = dict(module.named_parameters()).get(key)
            assert parameter is None or parameter.dtype == torch.float32, f"{prefix}.{key}"
    of_low = run(low)
    assert of_low[0].dtype == dtype
    of_mixed = run(make(name, device=device, dtype=torch.float32), autocast=True)
    for kind, found in (("model", of_low), ("autocast", of_mixed)):
        for what, *values in zip(
            ("logits", "step", "gradients"), found, exact, allowed, strict=True
        ):
            assert_close_in(dtype, *values, msg=f"{what} of {kind}")


@every_model
def test_spec_survives_json_and_says_what_is_misspelt(name):
    spec = model_spec(name)
    data = json.loads(json.dumps(spec.to_dict()))
    assert ModelSpec.from_dict(data) == spec
    where = "mixer" if name in MIXERS else "channel"
    data["blocks"][1][where]["widht"] = 3
    with pytest.raises(SpecError, match=rf"blocks\[1\]\.{where}\.widht: unknown"):
        ModelSpec.from_dict(data)


@every_model
def test_float64_stays_float64(name):
    exam.float64_stays_float64(exam_of(name))


@every_model
def test_parameter_groups_hold_every_parameter_once(name):
    model = make(name)
    groups = model.parameter_groups(1e-3, 0.1)
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    decayed = {p for group in groups if group["weight_decay"] for p in group["params"]}
    assert all(p.ndim >= 2 for p in decayed)
    assert {m.engine for m in model.modules() if isinstance(m, Mixer)} == {"auto"}
    assert len(model.blocks) == LAYERS


LISTED = ("moe-listed", "moe-gpt-oss")  # whose experts need to know how many rows each gets


@pytest.mark.parametrize("name", [n for n in (*MIXERS, *CHANNELS) if n not in LISTED])
def test_flops_can_be_counted_on_the_meta_device(name):
    """Nothing is allocated. A list of experts is split by data, which meta tensors lack."""
    spec = model_spec(name)
    model = build_model(spec, device="meta")
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
    ):
        model(torch.zeros(2, 7, dtype=torch.long, device="meta"))
    assert counter.get_total_flops() == spec.cost(7, 2).flops
