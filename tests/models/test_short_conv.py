"""Gated short convolution against transformers' layer of LFM2."""

import pytest
import torch
from peers import cache_argument
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers import ShortConvSpec


@pytest.mark.parametrize("bias", [False, True])
def test_parity_with_lfm2(bias):
    """In one call, and from the peer's cache token by token, with the peer's own weights."""
    pytest.importorskip("transformers", reason="parity with transformers: it is not installed")
    from transformers import DynamicCache, Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    config = Lfm2Config(
        hidden_size=12, conv_L_cache=3, conv_bias=bias, layer_types=["conv"], num_hidden_layers=1
    )
    theirs = Lfm2ShortConv(config, 0).double()
    ours = ShortConvSpec(d_conv=3, bias=bias).build(LayerContext(12)).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(ours(x).y, theirs(x))
    cache, out = {cache_argument(theirs): DynamicCache(config=config)}, ours(x[:, :6])
    assert_close(out.y, theirs(x[:, :6], **cache))
    for t in range(6, 9):
        out = ours.step(x[:, t], out.state)
        assert_close(out.y, theirs(x[:, t : t + 1], **cache)[:, 0])


def test_an_output_depends_on_d_conv_tokens():
    module = ShortConvSpec(d_conv=3).build(LayerContext(4)).double()
    x = torch.randn(1, 8, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(x).y[0, 6].sum(), x)
    assert (gradient[0].abs().sum(-1) > 0).tolist() == [t in (4, 5, 6) for t in range(8)]
    assert module.spec.context_window == 3


def test_no_taps_are_refused():
    with pytest.raises(SpecError, match=r"m\.d_conv: 0 is not positive"):
        ShortConvSpec(d_conv=0).check(4, "m")
