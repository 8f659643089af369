"""Mixtral, Qwen3-MoE and OLMoE layers of transformers: outputs, gradients and balance loss."""

import pytest
import torch
from tolerance import assert_close

from kizzasi.models.call import Call
from kizzasi.models.channels.moe import MoESpec
from kizzasi.models.mixer import LayerContext
from kizzasi.models.moe import convert_experts

transformers = pytest.importorskip("transformers", reason="parity needs transformers")

D, H, E, K = 16, 24, 6, 2


def mixtral():
    from transformers.models.mixtral import modeling_mixtral as hf

    config = transformers.MixtralConfig(
        hidden_size=D, intermediate_size=H, num_local_experts=E, num_experts_per_tok=K
    )
    return hf, hf.MixtralSparseMoeBlock, config, "topk"


def qwen3_moe(norm=True):
    from transformers.models.qwen3_moe import modeling_qwen3_moe as hf

    config = transformers.Qwen3MoeConfig(
        hidden_size=D,
        moe_intermediate_size=H,
        num_experts=E,
        num_experts_per_tok=K,
        norm_topk_prob=norm,
    )
    return hf, hf.Qwen3MoeSparseMoeBlock, config, "topk" if norm else "all"


def olmoe():
    from transformers.models.olmoe import modeling_olmoe as hf

    config = transformers.OlmoeConfig(
        hidden_size=D, intermediate_size=H, num_experts=E, num_experts_per_tok=K
    )
    return hf, hf.OlmoeSparseMoeBlock, config, "all"


@pytest.mark.parametrize("family", [mixtral, qwen3_moe, lambda: qwen3_moe(norm=False), olmoe])
def test_layer_equals_transformers(family):
    hf, block, config, normalize = family()
    config._experts_implementation = "eager"
    theirs = block(config)
    generator = torch.Generator().manual_seed(0)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=generator)
    coeff = 0.05
    spec = MoESpec(
        n_experts=E,
        top_k=K,
        hidden=H,
        normalize=normalize,
        balance_weight=coeff * K,  # transformers adds the k slots up where f is their mean
        z_loss_weight=0.0,
    )
    ours = spec.build(LayerContext(D))
    ours.load_state_dict(convert_experts(theirs.state_dict(), E, "list"))
    x = torch.randn(2, 9, D, generator=generator, requires_grad=True)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :3] = 0
    out = ours(x, call=Call.of(x, mask - 1))
    logits = theirs.gate(x)[0]
    balance = coeff * hf.load_balancing_loss_func((logits,), E, K, mask)
    assert_close(out.aux["moe_balance"], balance)
    real = mask.bool()
    y = theirs(x)
    y = y[0] if isinstance(y, tuple) else y
    assert_close(out.y[real], y[real])
    got = torch.autograd.grad(out.y[real].cos().sum() + out.aux["moe_balance"], x)
    want = torch.autograd.grad(y[real].cos().sum() + balance, x)
    assert_close(got[0], want[0])
