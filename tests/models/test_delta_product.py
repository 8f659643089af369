"""Gated DeltaProduct against a loop over single updates, and what several updates can do."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers import DeltaProductSpec
from kizzasi.models.ops.delta import delta_rule

D, HEADS, UPDATES = 12, 2, 3


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(**fields):
    module = DeltaProductSpec(n_heads=HEADS, n_updates=UPDATES, **fields).build(LayerContext(D))
    module = module.double()
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.add_(0.3 * draw(*p.shape, seed=i))
    return module


def paper(module, x):
    """Section 3 for one sequence x (t, d), one update after another."""
    w = dict(module.named_parameters())
    spec, (n, m) = module.spec, (module.d_k, module.d_v)
    wide = torch.cat([x @ w[f"in_proj_{name}.weight"].T for name in "qkv"], -1)
    taps = w["conv1d.weight"].squeeze(1)
    padded = F.pad(wide, (0, 0, taps.shape[1] - 1, 0))
    convolved = F.silu(
        torch.stack([(padded[t : t + taps.shape[1]].T * taps).sum(-1) for t in range(len(x))])
    )
    q, k, v = convolved.split(module.parts, -1)
    beta = torch.sigmoid(x @ w["in_proj_beta.weight"].T)
    beta = 2 * beta if spec.negative_eigenvalues else beta
    decay = torch.ones(len(x), HEADS, dtype=x.dtype)
    if spec.gated:
        dt = F.softplus(x @ w["in_proj_a.weight"].T + w["dt_bias"])
        decay = torch.exp(-w["A_log"].exp() * dt)
    heads = []
    for h in range(HEADS):
        S, ys = torch.zeros(n, m, dtype=x.dtype), []
        for t in range(len(x)):
            S = decay[t, h] * S
            for j in range(UPDATES):
                key = k[t].view(UPDATES, HEADS, n)[j, h]
                key = key / (key @ key + 1e-6).sqrt()
                value, b = v[t].view(UPDATES, HEADS, m)[j, h], beta[t].view(UPDATES, HEADS)[j, h]
                S = S - b * torch.outer(key, key @ S) + b * torch.outer(key, value)
            query = q[t].view(HEADS, n)[h]
            ys.append(query / (query @ query + 1e-6).sqrt() / n**0.5 @ S)
        y = torch.stack(ys)
        size = (y.square().mean(-1, keepdim=True) + spec.norm_eps).sqrt()
        heads.append(y / size * w["norm.weight"])
    return (torch.cat(heads, -1) * F.silu(x @ w["g_proj.weight"].T)) @ w["out_proj.weight"].T


@pytest.mark.parametrize("length", [1, 7, 40])
@pytest.mark.parametrize(
    "fields", [{}, {"gated": False, "expand_v": 0.5}, {"negative_eigenvalues": False}]
)
def test_it_is_the_papers_loop(length, fields):
    module, x = build(**fields), draw(2, length, D)
    y = module(x).y
    for row in range(2):
        assert_close(y[row], paper(module, x[row]))


def test_two_updates_can_rotate_and_one_can_only_reflect():
    """Two reflections by 90 degrees between keys at 45: the memory turns by a right angle."""
    keys = torch.tensor([[1.0, 0.0], [0.5**0.5, 0.5**0.5]], dtype=torch.float64)
    turn = torch.eye(2, dtype=torch.float64)
    for k in keys:
        turn = (torch.eye(2) - 2 * torch.outer(k, k)) @ turn
    assert_close(turn, torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64))
    zeros = torch.zeros(1, 2, 1, 2, dtype=torch.float64)
    beta = torch.full((1, 2, 1), 2.0, dtype=torch.float64)
    start = draw(1, 1, 2, 2)
    _, memory = delta_rule(zeros, keys[None, :, None], zeros, zeros[..., :1], beta, start)
    assert_close(memory[0, 0], turn @ start[0, 0])


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(SpecError, match=r"m\.expand_v: 0\.3 gives values of 1\.8 channels"):
        DeltaProductSpec(n_heads=2, expand_v=0.3).check(12, "m")
    with pytest.raises(SpecError, match=r"m\.n_heads: 5 does not divide d_model 12"):
        DeltaProductSpec(n_heads=5).check(12, "m")
