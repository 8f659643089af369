"""The RG-LRU: its scan against the loop, its block against transformers' RecurrentGemma."""

import pytest
import torch
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers import RGLRUSpec
from kizzasi.models.ops.decay_scan import decay_scan, decay_scan_ref

LENGTHS = (1, 2, 7, 15, 16, 17, 63, 64, 65, 300)


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("strength", [1e-6, 1.0, 1e3])
def test_passes_equal_the_loop(length, packed, strength):
    starts = draw(2, length) > 1 if packed else None

    def run(function):
        log_a, u, h0 = draw(2, length, 3), draw(2, length, 3, seed=2), draw(2, 3, seed=3)
        leaves = [x.requires_grad_() for x in (-strength * log_a.abs(), u, h0)]
        h, last = function(*leaves, starts)
        (h.sin().sum() + last.cos().sum()).backward()
        return [h, last, *(x.grad for x in leaves)]

    for a, b in zip(run(decay_scan), run(decay_scan_ref), strict=True):
        assert_close(a, b)


def test_a_decay_of_nothing_and_of_everything():
    u = draw(1, 40, 2)
    kept, _ = decay_scan(torch.zeros_like(u), u)
    assert_close(kept, u.cumsum(1))
    lost, _ = decay_scan(torch.full_like(u, -torch.inf), u)
    assert torch.equal(lost, u)


def weights_of(theirs):
    """The weights of a RecurrentGemma block under our names."""
    names = {
        "rg_lru.recurrent_param": "Lambda",
        "rg_lru.input_gate_weight": "input_gate.weight",
        "rg_lru.input_gate_bias": "input_gate.bias",
        "rg_lru.recurrent_gate_weight": "recurrent_gate.weight",
        "rg_lru.recurrent_gate_bias": "recurrent_gate.bias",
    }
    return {names.get(name, name): value for name, value in theirs.state_dict().items()}


def test_parity_with_recurrent_gemma():
    """In one call and token by token; the first token of a sequence is written whole."""
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import (
        RecurrentGemmaRecurrentBlock,
    )

    config = transformers.RecurrentGemmaConfig(
        hidden_size=12, lru_width=12, num_attention_heads=3, num_key_value_heads=1
    )
    theirs = RecurrentGemmaRecurrentBlock(config, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    ours = RGLRUSpec(n_heads=3, d_conv=config.conv1d_width).build(LayerContext(12))
    ours.load_state_dict(weights_of(theirs))
    x = torch.randn(2, 9, 12, generator=generator)
    place = torch.arange(9)[None].expand(2, -1)
    with torch.no_grad():
        they, _ = theirs(x, place, None, use_cache=False)
        assert_close(ours(x).y, they, dtype=torch.float32)
        theirs(x[:, :6], place[:, :6], None)
        out = ours(x[:, :6])
        for t in range(6, 9):
            out = ours.step(x[:, t], out.state)
            they, _ = theirs(x[:, t : t + 1], place[:, t : t + 1], None)
            assert_close(out.y, they[:, 0], dtype=torch.float32)


def test_open_gates_begin_within_the_range_of_decays():
    module = RGLRUSpec(n_heads=1, a_min=0.5, a_max=0.6).build(LayerContext(200))
    decay = torch.exp(-8 * torch.nn.functional.softplus(module.Lambda))
    assert 0.5 <= decay.min() < 0.51
    assert 0.59 < decay.max() <= 0.6


def test_a_gate_that_is_shut_leaves_gradients_finite():
    module = RGLRUSpec(n_heads=1).build(LayerContext(4))
    with torch.no_grad():
        module.recurrent_gate.bias.fill_(-200.0)
    x = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    module(x).y.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(SpecError, match=r"m\.n_heads: 5 does not divide d_rnn 12"):
        RGLRUSpec(n_heads=5).check(12, "m")
