"""Latent bits: paid for in every score, drawn from the prior in every text."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.call import Call
from kizzasi.models.channels import MLPSpec
from kizzasi.models.layers import LatentSpec, LoopSpec
from kizzasi.models.layers.latent import with_latent_key
from kizzasi.models.loss import with_charge
from kizzasi.models.mixers import AttentionSpec, MambaSpec
from kizzasi.testing.mixer import CPU_ATTENTION
from kizzasi.train import Recipe, Training
from kizzasi.train.leak import find_leak
from kizzasi.train.token_ids import TokenIds

HEADS = BlockSpec(AttentionSpec(n_heads=2), MLPSpec(hidden=16))
SEES_ALL = BlockSpec(AttentionSpec(n_heads=2, causal=False), MLPSpec(hidden=16))
LOW_RANK = BlockSpec(AttentionSpec(n_heads=2, qkv_rank=2))
MIXES = BlockSpec(MambaSpec(d_state=2))
LATENT = LatentSpec((HEADS,), (SEES_ALL,), n_bits=3)
SPEC = ModelSpec(16, (HEADS, LATENT), Tokens(7))
FORMS = {
    "add": LATENT,
    "table": replace(LATENT, form="table"),
    "film-lora": replace(LATENT, inject=("film", "lora"), rank=2),
    "turning": replace(LATENT, inject=("film", "lora"), rank=2, film_at="norm", lora_at="q"),
    "paper": replace(LATENT, inject=("kv",), query="learned", form="table"),
}


def perturbed(spec=SPEC, scale=0.3):
    model = build_model(spec, seed=1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
    return model


def ids(*shape, seed=0):
    return torch.randint(7, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", FORMS)
def test_the_layer_starts_as_its_body_whatever_the_bits(form):
    model, x = build_model(SPEC.replace(blocks=(HEADS, FORMS[form])), seed=0), ids(2, 9)
    layer: Any = model.blocks[1]
    stream = model.hidden(x, layer=1)
    plain = layer.body(stream, None, Call.of(stream)).x
    for module in (model.train(), model.eval()):
        torch.testing.assert_close(module.hidden(x, layer=2), plain)


@pytest.mark.parametrize("form", FORMS)
def test_every_part_learns(form):
    model, x = (
        perturbed(SPEC.replace(blocks=(HEADS, replace(FORMS[form], free_bits=0.0)))),
        ids(2, 9),
    )
    model.train()(x).loss(x.roll(-1, 1)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_coded_score_is_that_of_the_tokens_plus_that_of_the_bits():
    model, x = perturbed().eval(), ids(2, 9)
    seen = []
    layer: Any = model.blocks[1]
    layer.register_forward_hook(lambda _, __, out: seen.append(out.aux["charge"]))
    out = model(x, coded=True)
    targets = x.roll(-1, 1)
    assert out.logits.shape == (2, 9, 8)
    assert out.aux == {}
    each = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), reduction="none")
    tokens = out.logits[..., :7].log_softmax(-1).flatten(0, 1)
    nll = -tokens.gather(1, targets.flatten()[:, None])[:, 0]
    torch.testing.assert_close(each, nll + seen[0].flatten())
    p = layer.read(
        layer.norm(layer.encoder(model.hidden(x, layer=1), None, Call.of(x)).x)
    ).sigmoid()
    kl = (p * (2 * p).log() + (1 - p) * (2 - 2 * p).log()).sum(-1)
    torch.testing.assert_close(seen[0], kl)
    plain = with_charge(torch.randn(3, 5), torch.zeros(3))
    assert (plain[:, -1] == -math.inf).all()
    assert torch.equal(
        build_model(SPEC.replace(blocks=(HEADS,)), seed=0)(x, coded=True).logits,
        build_model(SPEC.replace(blocks=(HEADS,)), seed=0)(x).logits,
    )


def test_what_the_encoder_tells_is_paid_for():
    """A coin is thrown and repeated: the bits tell of it, yet no score falls below its entropy."""
    coin = ids(256, 1, seed=5) % 2
    x = torch.cat([torch.full((256, 1), 3), coin.expand(-1, 5)], 1)
    spec = ModelSpec(16, (replace(LATENT, n_bits=2, free_bits=2.0),), Tokens(4))
    model = build_model(spec, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-2)
    torch.manual_seed(0)
    for _ in range(80):
        optimizer.zero_grad()
        model.train()(x[:, :-1]).loss(x[:, 1:]).backward()
        optimizer.step()
    with torch.no_grad():
        coded = model.eval()(x[:, :-1], coded=True).logits
    told = F.cross_entropy(coded[:, 0, :4], x[:, 1]).item()
    paid = F.cross_entropy(coded.flatten(0, 1), x[:, 1:].flatten()).item() * 5
    assert told < 0.3  # of ln 2 = 0.69: the coin is known before it falls
    assert paid > math.log(2)


def test_bits_of_a_text_are_those_of_its_key_and_show_no_future():
    model, x = perturbed().eval(), ids(2, 12)
    assert find_leak(model) is None
    state = model.init_state(2)
    plain = model(x, state).logits
    assert torch.equal(plain, model(x).logits)
    other = with_latent_key(state, torch.tensor([0, 9]))
    changed = model(x, other).logits
    assert torch.equal(changed[0], plain[0])
    assert not torch.allclose(changed[1], plain[1])
    out, rows = model(x[:, :5], other), []
    for token in x[:, 5:].unbind(1):
        out = model.step(token, out.state)
        rows.append(out.logits)
    torch.testing.assert_close(torch.stack(rows, 1), changed[:, 5:])
    assert model.generate(x[0, :4], max_new_tokens=3).shape == (7,)


def test_in_the_papers_form_bits_reach_keys_and_values_alone():
    model, x = perturbed(SPEC.replace(blocks=(HEADS, FORMS["paper"]))), ids(1, 12)
    latent: Any = model.eval().blocks[1]
    attention = latent.body[0].mixer

    def moved():
        texts = [model(x, with_latent_key(model.init_state(1), key)).logits for key in (0, 9)]
        return (texts[0] - texts[1]).abs().max().item()

    for silent in (attention.k_proj, attention.v_proj):
        weight = silent.weight.detach().clone()
        assert moved() > 1e-3
        nn.init.zeros_(silent.weight)
    assert moved() == 0
    with torch.no_grad():
        attention.k_proj.weight.copy_(weight)  # keys alone: there are no values to tell apart
    assert moved() == 0


@pytest.mark.parametrize("form", FORMS)
def test_flops_of_coding_are_measured(form):
    model = build_model(SPEC.replace(blocks=(HEADS, FORMS[form], HEADS))).eval()
    for coded, more in ((False, 0), (True, model.spec.coding_flops(9, 2))):
        counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
        with counter, torch.no_grad():
            model(ids(2, 9), coded=coded)
        assert counter.get_total_flops() == model.spec.cost(9, 2).flops + more
    assert model.spec.coding_flops(9, 2) > SPEC.replace(blocks=(HEADS,)).coding_flops(9, 2) == 0


def test_a_learned_query_knows_nothing_of_its_token():
    """Without positions all queries are one, and so are all bits; the stream's own differ."""
    blind = replace(HEADS, mixer=AttentionSpec(n_heads=2, causal=False, position="none"))
    for query, equal in (("learned", True), ("stream", False)):
        layer = replace(LATENT, encoder=(blind,), query=query)
        out = perturbed(SPEC.replace(blocks=(HEADS, layer))).eval()
        latent: Any = out.blocks[1]
        read = []
        latent.read.register_forward_hook(lambda _, __, y, read=read: read.append(y))
        out(ids(1, 6), coded=True)
        assert torch.allclose(read[0], read[0][:, :1].expand_as(read[0])) == equal
        out(ids(1, 6, seed=4), coded=True)
        assert not torch.allclose(read[0], read[1])  # but of the document


def test_a_training_scores_the_bits_too(tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, ids(600).numpy())
    task, recipe = TokenIds.open(path, vocab_size=7), Recipe(64, seq_len=8, batch_size=2)
    training = Training(perturbed(scale=1.0).float(), task, recipe)
    asked = []
    training.model.register_forward_hook(
        lambda _, args, kwargs, out: asked.append(out.logits.shape[-1]), with_kwargs=True
    )
    training.score()
    assert set(asked) == {8}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (replace(LATENT, n_bits=9, form="table"), "n_bits: 9 bits make"),
        (replace(LATENT, free_bits=-1.0), "free_bits: -1.0 is negative"),
        (replace(LATENT, inject=()), "inject: .* must name"),
        (replace(LATENT, inject=("lora",)), "rank: .* needs a rank"),
        (replace(LATENT, film_at="q"), "film_at: 'film' is not among inject"),
        (
            replace(LATENT, body=(MIXES,), inject=("lora",), rank=2, lora_at="v"),
            "lora_at: the first layer has no 'v'",
        ),
        (replace(LATENT, rank=2), "rank: .* takes no rank"),
        (replace(LATENT, inject=("kv", "add")), "inject: what is added reaches keys"),
        (replace(LATENT, inject=("kv",), body=(LOW_RANK,)), r"body\[0\]: its keys .* inject 'add'"),
        (replace(LATENT, query="learned", encoder=(MIXES,)), r"encoder\[0\]: its .* 'stream'"),
        (replace(LATENT, body=(SEES_ALL,)), "body: it reads later tokens"),
        (LoopSpec((LATENT,), 2), r"body\[0\]: latent bits inside a layer"),
    ],
)
def test_what_does_not_fit_is_refused(spec, message):
    with pytest.raises(SpecError, match=message):
        spec.check(16, "")
