"""RMSNorm on the CPU, written out in few operations, against torch's."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close

from kizzasi.models import cost
from kizzasi.models.norm import Norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e3])
@pytest.mark.parametrize("kind", ["rms", "rms_plus_one"])
def test_rms_equals_torch_with_gradients(dtype, size, kind):
    norm = Norm(kind, 48).to(dtype)
    x = torch.linspace(-size, 2 * size, 5 * 48, dtype=dtype).view(5, 48).requires_grad_()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 48))
    results = []
    for y in (norm(x), F.rms_norm(x, (48,), norm.weight + (kind != "rms"), norm.eps)):
        assert y.dtype == dtype
        loss = (y * torch.linspace(-1, 1, 48, dtype=dtype)).sum()
        results.append((y, *torch.autograd.grad(loss, (x, norm.weight))))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("kind", ["rms", "rms_plus_one", "layer"])
def test_every_kind_starts_with_scale_one_and_costs_what_it_holds(kind):
    norm = Norm(kind, 48)
    norm.reset_parameters()
    x = torch.linspace(-3, 5, 96).view(2, 48)
    assert_close(norm(x).square().mean(-1), torch.ones(2))
    assert cost.norm(kind, 48).params == sum(p.numel() for p in norm.parameters())


def test_plus_one_equals_gemma():
    pytest.importorskip("transformers", reason="parity with transformers: it is not installed")
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    theirs, ours = GemmaRMSNorm(48, eps=1e-6), Norm("rms_plus_one", 48, 1e-6)
    with torch.no_grad():
        theirs.weight.normal_()
    ours.load_state_dict(theirs.state_dict())
    x = torch.linspace(-3, 5, 96).view(2, 48)
    assert_close(ours(x), theirs(x))


def test_nothing_comes_of_zeros_and_low_precision_is_summed_in_float32():
    norm = Norm("rms", 48)
    norm.reset_parameters()
    zeros = torch.zeros(2, 48, requires_grad=True)
    norm(zeros).sum().backward()
    assert zeros.grad is not None
    assert zeros.grad.isfinite().all()
    x = torch.linspace(-3, 5, 48)[None].bfloat16()
    assert torch.equal(norm(x), norm(x.float()).bfloat16())
