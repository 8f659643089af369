"""Lightning attention against transformers' layer of MiniMax."""

import pytest
import torch
from peers import cache_argument
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers import LightningSpec


@pytest.mark.parametrize("layer", [0, 2])
def test_parity_with_minimax(layer):
    """In one call, and from the peer's cache token by token; decays depend on the layer."""
    pytest.importorskip("transformers", reason="parity with transformers: it is not installed")
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import (
        MiniMaxCache,
        MiniMaxLightningAttention,
    )

    config = MiniMaxConfig(
        hidden_size=12,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=6,
        num_hidden_layers=4,
        block_size=4,
        layer_types=["linear_attention"] * 4,
    )
    theirs = MiniMaxLightningAttention(config, layer).double()
    spec = LightningSpec(n_heads=2, head_dim=6, norm_eps=theirs.norm.variance_epsilon)
    ours = spec.build(LayerContext(12, layer, 4)).double()
    names = ours.state_dict().keys()
    ours.load_state_dict({name: theirs.state_dict()[name] for name in names})
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        assert_close(ours(x).y, theirs(x, None, None)[0], dtype=torch.float32)
        cache, out = {cache_argument(theirs): MiniMaxCache()}, ours(x[:, :6])
        for i in range(layer):
            cache[cache_argument(theirs)].set_linear_cache(i, torch.zeros(0))
        theirs(x[:, :6], None, None, **cache)
        for t in range(6, 9):
            out = ours.step(x[:, t], out.state)
            they = theirs(x[:, t : t + 1], None, None, **cache)[0][:, 0]
            assert_close(out.y, they, dtype=torch.float32)  # their slopes are float32


def test_deeper_layers_forget_more_slowly():
    decays = [
        LightningSpec(n_heads=4).build(LayerContext(8, i, 3))._decay(torch.zeros(1)).squeeze(-1)
        for i in range(3)
    ]
    assert_close(decays[0], -torch.tensor([2**-2, 2**-4, 2**-6, 2**-8]), dtype=torch.float32)
    assert (decays[0] < decays[1]).all()
    assert (decays[1] < decays[2]).all()


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(SpecError, match=r"m\.n_heads: 5 does not divide d_model 12"):
        LightningSpec(n_heads=5).check(12, "m")
