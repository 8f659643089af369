"""Adapters on every Linear train and change the output: no kernel reads weights behind a module."""

import pytest
import torch
from cases import CAUSAL, every_kind, make, tokens
from tolerance import assert_close
from torch import nn

peft = pytest.importorskip("peft")


def adapt(model):
    """The model with adapters in place, and their parameters."""
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=linears)
    adapted = peft.inject_adapter_in_model(config, model)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(linears)
    return adapted, trained


@every_kind
def test_adapters_on_every_linear_train_and_change_the_output(name):
    model, x = make(name, dtype=torch.float32), tokens(2, 9)
    before = model(x).logits.detach()
    adapted, trained = adapt(model)
    assert_close(adapted(x).logits, before)  # B starts at zero
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(2):  # A has a gradient as soon as B is not zero
        optimizer.zero_grad()
        adapted(x).loss(x).backward()
        optimizer.step()
    for parameter_name, p in trained.items():
        assert p.grad is not None, parameter_name
        assert p.grad.abs().sum() > 0, parameter_name
    after = adapted(x)
    assert not torch.allclose(after.logits, before)
    if CAUSAL[name]:
        state = adapted(x[:, :-1]).state
        assert_close(adapted.step(x[:, -1], state).logits, after.logits[:, -1])


@pytest.mark.parametrize("name", ["mamba-small", "gla-two-heads", "routed-top1", "moe-top2"])
def test_what_keeps_float32_keeps_it_under_adapters(name):
    adapted, _ = adapt(make(name, dtype=torch.float32))
    assert adapted.to(torch.bfloat16)(tokens(2, 9)).logits.dtype == torch.bfloat16


def test_adapters_reach_packed_experts_by_target_parameters():
    model, x = make("moe-top2", dtype=torch.float32), tokens(2, 9)
    before = model(x).logits.detach()
    packed = [n for n, _ in model.named_parameters() if ".experts." in n]
    assert len(packed) == 4
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=packed)
    adapted = peft.inject_adapter_in_model(config, model)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(packed)
    assert_close(adapted(x).logits, before)
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(x).loss(x).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    after = adapted(x)
    assert not torch.allclose(after.logits, before)
    state = adapted(x[:, :-1]).state
    assert_close(adapted.step(x[:, -1], state).logits, after.logits[:, -1])
