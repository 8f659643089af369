"""Layers that take some rows and leave others: in a graph a step runs for all of them."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.channels import MLPSpec
from kizzasi.models.export import StepModule
from kizzasi.models.layers import ChunkedSpec, DepthRoutedSpec, DownsampleSpec
from kizzasi.models.mixers import AttentionSpec, MambaSpec
from kizzasi.testing.mixer import fold
from kizzasi.testing.tolerance import assert_close

HEADS = BlockSpec(AttentionSpec(n_heads=2), MLPSpec(hidden=16))
NEAR = BlockSpec(AttentionSpec(n_heads=2, window=2, kv_quant="int8"))
BODY = (HEADS, NEAR, BlockSpec(MambaSpec(d_state=2)))
LAYERS = {
    "downsample": DownsampleSpec(BODY, 2, pooling="linear", upsampling="linear"),
    "nested": DownsampleSpec((DownsampleSpec(BODY, 2), HEADS), 2),
    "chunked": ChunkedSpec(BODY),
    "depth_routed": DepthRoutedSpec(BODY),
}


def perturbed(*layers):
    model = build_model(ModelSpec(16, (HEADS, *layers), Tokens(11)), seed=0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
    return model.eval()


def tokens(batch, n):
    return torch.randint(11, (batch, n), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_a_step_for_all_rows_equals_one_for_those_that_are_due(name, monkeypatch):
    """Rows of unequal age, so that some are due and others not."""
    model, x = perturbed(LAYERS[name]), tokens(3, 9)
    mask = torch.arange(4) >= torch.tensor([[0], [1], [3]])
    start = model(x[:, :4], mask=mask).state
    expected, state = fold(model, x[:, 4:], start)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    actual, after = fold(model, x[:, 4:], start)
    assert_close(actual, expected)
    monkeypatch.undo()
    assert_close(model(x[:, :3], after).logits, model(x[:, :3], state).logits)
    first, _ = fold(model, x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_close(fold(model, x)[0], first)
    if name in ("chunked", "depth_routed"):
        with pytest.raises(SpecError, match=rf"{name}: .* or a step"):
            model(x)


@torch.no_grad()
@pytest.mark.parametrize("name", ["downsample", "chunked", "depth_routed"])
def test_torch_export_holds_a_step(name):
    """A window remembers as much at any age: one program is good for a stream of any length."""
    spec: Any = LAYERS[name]
    layer = replace(spec, body=(NEAR,))
    model = build_model(ModelSpec(16, (layer,), Tokens(11)), seed=3).eval()
    step = StepModule(model, 2)
    x = tokens(2, 8)
    program = torch.export.export(step, (x[:, 0], *step.flat()), strict=False).module()
    state, rows = step.flat(), []
    for token in x.unbind(1):
        logits, *state = program(token, *state)
        rows.append(logits)
    torch.testing.assert_close(torch.stack(rows, 1), model(x).logits)
