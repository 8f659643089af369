"""Where a layer's norms stand and how its branches are added, by the formulas of the papers."""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.channels import MLPSpec, SwiGLUSpec
from kizzasi.models.layers.block import Block
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers import AttentionSpec
from kizzasi.models.norm import Norm

D = 8


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(**fields):
    block = Block(BlockSpec(AttentionSpec(2), MLPSpec(), **fields), LayerContext(D)).double()
    with torch.no_grad():
        for i, p in enumerate(block.parameters()):
            p.add_(0.3 * draw(*p.shape, seed=i))
    return block


def run(block, x):
    mixer, channel = (lambda u: block.mixer(u).y), (lambda u: block.channel(u).y)
    return block(x).y, mixer, channel


def test_pre_norm_is_the_plain_layer():
    block, x = build(), draw(2, 5, D)
    y, mixer, channel = run(block, x)
    x = x + mixer(block.mixer_norm(x))
    assert_close(y, x + channel(block.channel_norm(x)))
    assert block.mixer_post_norm is None


def test_post_norms_stand_before_the_sum():
    block, x = build(norm_at="post"), draw(2, 5, D)
    y, mixer, channel = run(block, x)
    x = x + block.mixer_post_norm(mixer(x))
    assert_close(y, x + block.channel_post_norm(channel(x)))
    assert block.mixer_norm is None


def test_a_sandwich_norms_twice_and_scales_what_it_adds():
    block, x = build(norm_at="both", residual_scale=0.3, stream_scale=1.7), draw(2, 5, D)
    y, mixer, channel = run(block, x)
    x = 1.7 * x + 0.3 * block.mixer_post_norm(mixer(block.mixer_norm(x)))
    assert_close(y, 1.7 * x + 0.3 * block.channel_post_norm(channel(block.channel_norm(x))))


def test_parallel_branches_read_the_same_stream():
    block, x = build(parallel="separate", stream_scale=2.0), draw(2, 5, D)
    y, mixer, channel = run(block, x)
    assert_close(y, 2 * x + mixer(block.mixer_norm(x)) + channel(block.channel_norm(x)))
    block = build(parallel="shared")
    y, mixer, channel = run(block, x)
    read = block.mixer_norm(x)
    assert_close(y, x + mixer(read) + channel(read))
    assert block.channel_norm is None


def test_dropout_falls_on_what_is_added():
    block = Block(BlockSpec(AttentionSpec(2), MLPSpec()), LayerContext(D), dropout=0.999).train()
    x = torch.randn(1, 4, D)
    assert (block(x).y == x).double().mean() > 0.9


def test_embeddings_and_logits_are_scaled_and_capped():
    spec = ModelSpec(D, (BlockSpec(AttentionSpec(2)),), Tokens(11))
    scaled = spec.replace(embed_scale=3.0, logit_scale=2.0, logit_cap=0.5)
    plain, model = (build_model(s, dtype=torch.float64) for s in (spec, scaled))
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.3 * draw(*p.shape))
        model.load_state_dict(plain.state_dict())
        plain.stem.embedding.weight.mul_(3.0)
        ids = torch.tensor([[1, 5, 7]])
        logits = 2 * plain(ids).logits
        assert logits.abs().max() > 0.5
        assert_close(model(ids).logits, 0.5 * torch.tanh(logits / 0.5))


@pytest.mark.parametrize(
    ("name", "function"), [("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")), ("relu", F.relu)]
)
def test_gated_linear_units_by_activation(name, function):
    layer, x = SwiGLUSpec(activation=name).build(LayerContext(D)).double(), draw(3, D)
    expected = layer.down_proj(function(layer.gate_proj(x)) * layer.up_proj(x))
    assert_close(layer(x[None]).y[0], expected)


def test_scale_norm_and_layer_norm_without_bias():
    x = draw(3, D)
    norm = Norm("scale", D, 1e-12).double()
    assert norm.weight.item() == pytest.approx(math.sqrt(D))
    with torch.no_grad():
        norm.weight.fill_(1.5)
    torch.testing.assert_close(norm(x), 1.5 * x / x.norm(dim=-1, keepdim=True))
    norm = Norm("layer_unbiased", D).double()
    assert_close(norm(x), F.layer_norm(x, (D,), norm.weight))
    assert [name for name, _ in norm.named_parameters()] == ["weight"]


def test_layers_that_contradict_themselves_are_refused():
    with pytest.raises(SpecError, match=r"blocks\[0\]\.parallel: there is no channel"):
        ModelSpec(D, (BlockSpec(AttentionSpec(2), parallel="shared"),), Tokens(5)).check()
    block = BlockSpec(AttentionSpec(2), MLPSpec(), parallel="shared", norm_at="post")
    with pytest.raises(SpecError, match=r"blocks\[0\]\.parallel: no norm to share"):
        ModelSpec(D, (block,), Tokens(5)).check()
    with pytest.raises(SpecError, match=r"logit_cap: 0\.0 is not positive"):
        ModelSpec(D, (BlockSpec(AttentionSpec(2)),), Tokens(5), logit_cap=0.0).check()


def test_the_new_fields_leave_digests_alone_at_their_defaults():
    spec = ModelSpec(D, (BlockSpec(AttentionSpec(2), SwiGLUSpec()),), Tokens(5))
    for field in ("norm_at", "parallel", "residual_scale", "embed_scale", "logit_cap", "activ"):
        assert field not in spec.canonical_json()
    post = spec.replace(blocks=(BlockSpec(AttentionSpec(2), SwiGLUSpec(), norm_at="post"),))
    assert post.digest != spec.digest
    assert ModelSpec.from_dict(post.to_dict()) == post


def test_the_loss_in_chunks_scales_and_caps_too():
    spec = ModelSpec(D, (BlockSpec(AttentionSpec(2)),), Tokens(11), logit_scale=3.0, logit_cap=0.4)
    model, ids = build_model(spec, dtype=torch.float64), torch.tensor([[1, 5, 7, 2]])
    assert_close(model.loss(ids[:, :-1], ids[:, 1:]), model(ids[:, :-1]).loss(ids[:, 1:]))
    embeds = model.stem.embedding(ids)
    assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)
