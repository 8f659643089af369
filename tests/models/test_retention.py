"""Retention against the paper's parallel form, written with complex numbers."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models.call import Call
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers.retention import RetentionSpec

D, HEADS = 12, 2
LAYER = LayerContext(D)


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(**fields):
    module = RetentionSpec(HEADS, **fields).build(LAYER).double()
    module.reset_parameters(1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        module.g_norm.weight.add_(0.3 * draw(*module.g_norm.weight.shape))
        module.g_norm.bias.add_(0.3 * draw(*module.g_norm.bias.shape, seed=2))
    return module


def paper(module, x, theta=10000.0):
    """Equations 5 to 8 for one sequence x (t, d): (Q K^T . D) V per head, then norm and gate."""
    t, h = len(x), HEADS
    q, k, v = (
        (x @ p.weight.T).view(t, h, -1).transpose(0, 1)
        for p in (module.q_proj, module.k_proj, module.v_proj)
    )
    n, half = q.shape[-1], q.shape[-1] // 2
    angle = theta ** -(torch.arange(half, dtype=torch.float64) / half)
    turn = torch.exp(1j * torch.arange(t)[:, None] * angle)
    q, k = (torch.complex(s[..., :half], s[..., half:]) * turn for s in (q, k))
    index = torch.arange(t)
    gamma = 1 - 2.0 ** (-5 - torch.arange(h, dtype=torch.float64))
    decay = gamma[:, None, None] ** (index[:, None] - index).clamp(min=0)
    scores = (q @ k.mH).real / n**0.5 * decay.tril()
    heads = (scores @ v).transpose(0, 1)
    y = F.group_norm(
        heads.flatten(1), h, module.g_norm.weight, module.g_norm.bias, module.spec.norm_eps
    )
    return (F.silu(x @ module.g_proj.weight.T) * y) @ module.o_proj.weight.T


@pytest.mark.parametrize("length", [1, 7, 65])
@pytest.mark.parametrize("engine", ["torch", "reference"])
def test_it_is_the_papers_parallel_form(length, engine):
    module, x = build(), draw(2, length, D)
    module.engine = engine
    y = module(x).y
    for row in range(2):
        assert_close(y[row], paper(module, x[row]))


def test_values_of_any_width_and_another_base():
    module, x = build(expand_v=0.5, rope_theta=100.0), draw(1, 9, D)
    assert module.v_proj.weight.shape == (6, D)
    assert_close(module(x).y[0], paper(module, x[0], theta=100.0))


def test_positions_restart_at_documents_and_padding_leaves_no_trace():
    module, x = build(), draw(1, 20, D)
    ids = torch.tensor([[-1] * 3 + [0] * 7 + [4] * 10])
    out = module(x, call=Call.of(x, ids))
    assert_close(out.y[0, 3:10], paper(module, x[0, 3:10]))
    assert_close(out.y[0, 10:], paper(module, x[0, 10:]))
    alone = module(x[:, 10:]).state
    assert_close(out.state.memory, alone.memory)


def test_what_was_written_long_ago_is_turned_by_the_whole_distance():
    """A state taken through many tokens of no content, which only turn it, in one or many calls."""
    module, x = build(), draw(1, 1, D)
    first, still, last = module(x).state, torch.zeros(1, 500, D, dtype=torch.float64), draw(1, 4, D)
    once = module(last, module(still, first).state).y
    assert_close(once, module(torch.cat([x, still, last], 1)).y[:, -4:])
    state = first
    for i in range(500):
        state = module.step(still[:, i], state).state
    assert_close(module(last, state).y, once)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (RetentionSpec(0), "n_heads: 0 is not positive"),
        (RetentionSpec(5), "n_heads: 5 heads of d_model 12 have no even width"),
        (RetentionSpec(4), "n_heads: 4 heads of d_model 12 have no even width"),
        (RetentionSpec(2, expand_v=0.3), "expand_v: 0.3 gives heads 1.8 values wide"),
        (RetentionSpec(2, rope_theta=1.0), "rope_theta: 1.0 is not above 1"),
        (RetentionSpec(2, norm_eps=0.0), "norm_eps: 0.0 is not positive"),
    ],
)
def test_broken_rules_are_named(spec, message):
    with pytest.raises(SpecError, match=message):
        spec.check(D, "mixer")
