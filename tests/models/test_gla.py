"""Gated linear attention against a loop written from the paper."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers.gla import GLASpec

D, HEADS = 12, 2
LAYER = LayerContext(D)


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(**fields):
    module = GLASpec(HEADS, gate_rank=3, **fields).build(LAYER).double()
    module.reset_parameters(1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.add_(0.5 * draw(*p.shape, seed=i))
    return module


def paper(module, x):
    """Section 4.4, one head and one token at a time, for one sequence x (t, d)."""
    weights = dict(module.named_parameters())
    low = x @ weights["gk_proj.0.weight"].T @ weights["gk_proj.1.weight"].T
    gate = low + weights["gk_proj.1.bias"]
    alpha = torch.sigmoid(gate) ** (1 / module.spec.gate_normalizer)
    q, k, v, g = (x @ weights[f"{name}_proj.weight"].T for name in "qkvg")
    heads = []
    for head in range(HEADS):
        q_h, k_h, v_h, alpha_h = (s.chunk(HEADS, -1)[head] for s in (q, k, v, alpha))
        memory, ys = torch.zeros(module.n, module.m, dtype=x.dtype), []
        for t in range(len(x)):
            memory = torch.diag(alpha_h[t]) @ memory + torch.outer(k_h[t], v_h[t])
            ys.append(q_h[t] @ memory / module.n**0.5)
        y = torch.stack(ys)
        size = (y.square().mean(-1, keepdim=True) + module.spec.norm_eps).sqrt()
        heads.append(y / size * weights["g_norm.weight"])
    return (torch.cat(heads, -1) * F.silu(g)) @ weights["o_proj.weight"].T


@pytest.mark.parametrize("length", [1, 7, 65])
@pytest.mark.parametrize("fields", [{}, {"expand_k": 1.0, "expand_v": 1.5, "gate_normalizer": 0.1}])
def test_it_is_the_papers_loop(length, fields):
    module, x = build(**fields), draw(2, length, D)
    y = module(x).y
    for row in range(2):
        assert_close(y[row], paper(module, x[row]))


def test_names_and_shapes_are_those_of_fla():
    shapes = {name: tuple(p.shape) for name, p in build().named_parameters()}
    assert shapes == {
        "q_proj.weight": (6, 12),
        "k_proj.weight": (6, 12),
        "v_proj.weight": (12, 12),
        "gk_proj.0.weight": (3, 12),
        "gk_proj.1.weight": (6, 3),
        "gk_proj.1.bias": (6,),
        "g_proj.weight": (12, 12),
        "g_norm.weight": (6,),
        "o_proj.weight": (12, 12),
    }


def test_a_closed_gate_forgets_in_one_token():
    """float32, decays of exp(-800): nothing overflows, and each token stands alone."""
    module = build(gate_normalizer=1.0).float()
    with torch.no_grad():
        module.gk_proj[1].bias.fill_(-800.0)
    x = draw(1, 40, D).float().requires_grad_()
    y = module(x).y
    assert_close(y[0], module(x.transpose(0, 1)).y[:, 0])
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (GLASpec(0), "n_heads: 0 is not positive"),
        (GLASpec(2, gate_rank=0), "gate_rank: 0 is not positive"),
        (GLASpec(2, gate_normalizer=0.0), "gate_normalizer: 0.0 is not positive"),
        (GLASpec(4), "expand_k: 0.5 times d_model 12 over 4 heads is 1.5, not a whole number"),
        (GLASpec(2, expand_v=0.1), "expand_v: 0.1 times d_model 12 over 2 heads is 0.6, not"),
    ],
)
def test_broken_rules_are_named(spec, message):
    with pytest.raises(SpecError, match=message):
        spec.check(D, "mixer")
