"""Adapters on every Linear train and change the output: no kernel reads weights behind a module."""

import pytest
import torch
from cases import every_part, make, tokens
from torch import nn

peft = pytest.importorskip("peft")


@every_part
def test_adapters_on_every_linear_train_and_change_the_output(name):
    model, x = make(name, dtype=torch.float32), tokens(2, 9)
    before = model(x).logits.detach()
    linears = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=linears)
    adapted = peft.inject_adapter_in_model(config, model)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(linears)
    torch.testing.assert_close(adapted(x).logits, before)  # B starts at zero
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(2):  # A has a gradient as soon as B is not zero
        optimizer.zero_grad()
        adapted(x).loss(x).backward()
        for parameter_name, p in trained.items():
            assert p.grad is not None, parameter_name
        optimizer.step()
    for parameter_name, p in trained.items():
        assert p.grad is not None
        assert p.grad.abs().sum() > 0, parameter_name
    assert not torch.allclose(adapted(x).logits, before)
