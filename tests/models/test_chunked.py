"""Chunks by content, by their formulas: where they begin, their mean, the loss of their rate."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.channels import MLPSpec
from kizzasi.models.layers import ChunkedSpec
from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers import AttentionSpec, MambaSpec
from kizzasi.train.leak import find_leak

D = 8
HEADS = BlockSpec(AttentionSpec(2), MLPSpec(8))


def make(**fields):
    torch.manual_seed(1)
    spec = ChunkedSpec(**{"body": (HEADS,), "rate": 3.0, **fields})
    return spec.build(LayerContext(D), 1e-5, 0.0).double()


def stream(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_does_what_the_formulas_say():
    module, x = make(), stream(1, 12, D)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * stream(*p.shape, seed=3))
    q, k = module.q_proj(x[0]).detach(), module.k_proj(x[0]).detach()
    p = [1.0, *((1 - F.cosine_similarity(q[:-1], k[1:])) / 2).tolist()]
    begins = [t for t in range(12) if p[t] > 0.5]
    assert 2 < len(begins) < 12
    z, h, rows = module.body[0](x[:, begins]).y[0], torch.zeros(D, dtype=x.dtype), []
    for t in range(12):
        if t in begins:
            share = min(max(p[t], 1e-4), 1 - 1e-4)
            h = share * z[begins.index(t)] + (1 - share) * h
        rows.append(h + module.residual_proj(x[0, t]))
    out = module(x)
    assert_close(out.y[0], torch.stack(rows))
    f, g = len(begins) / 12, sum(p) / 12
    loss = 0.03 * 3 / 2 * (2 * f * g + (1 - f) * (1 - g))
    assert_close(out.aux["chunked"], torch.tensor(loss, dtype=x.dtype))
    assert torch.autograd.grad(out.y.sum(), module.q_proj.weight)[0].abs().max() > 0


def test_what_repeats_begins_no_chunk_and_a_fresh_layer_has_no_way_around():
    module, x = make(), stream(1, 1, D).expand(1, 6, D)
    out = module(x)
    assert_close(out.y, (module.body[0](x[:, :1]).y * (1 - 1e-4)).expand(1, 6, D))
    assert out.state.body[0].mixer.k.shape[2] == 1
    turned = torch.cat([x[:, :3], -x[:, 3:]], 1)
    assert module(turned).state.body[0].mixer.k.shape[2] == 2


def test_the_loss_is_its_weight_at_the_rate_that_is_asked_for():
    module = make(rate=4.0)
    p = torch.tensor([[1.0, 0, 0, 0] * 3], dtype=torch.float64)
    real = torch.ones_like(p, dtype=torch.bool)
    assert_close(module._loss(p, p > 0.5, None), torch.tensor(0.03, dtype=p.dtype))
    hidden = torch.cat([real, ~real], 1)
    more = torch.cat([p, torch.full_like(p, torch.nan)], 1)
    assert_close(module._loss(more, (more > 0.5) & hidden, hidden), module._loss(p, p > 0.5, None))


def test_the_rate_is_learnt():
    module, x = make(rate=5.0, weight=1.0), stream(8, 30, D)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.04)
    shares = []
    for _ in range(30):
        aux = module(x).aux["chunked"]
        optimizer.zero_grad()
        aux.backward()
        optimizer.step()
        p = module._differences(x, torch.zeros_like(x[:, 0])).detach()
        shares.append((p[:, 1:] > 0.5).double().mean().item())
    assert shares[0] > 0.4
    assert shares[-1] < 0.3


def test_a_model_of_chunks_leaks_nothing_and_steps():
    inner = ChunkedSpec(body=(HEADS,), rate=2.0)
    chunks = ChunkedSpec(body=(BlockSpec(MambaSpec(d_state=2)), inner), rate=2.0)
    model = build_model(ModelSpec(D, (HEADS, chunks, HEADS), Tokens(9)))
    assert find_leak(model) is None
    x = torch.arange(10).view(1, 10) % 9
    ids = model.generate(x, 3, temperature=0)
    assert torch.equal(ids[:, -1], model(ids[:, :-1]).logits[:, -1].argmax(-1))


def test_what_does_not_fit_is_refused():
    for fields, message in (
        ({"rate": 1.0}, r"blocks\[0\]\.rate: 1.0 leaves nothing out"),
        ({"weight": 0.0}, "weight: 0.0 is not positive"),
    ):
        with pytest.raises(SpecError, match=message):
            ModelSpec(D, (ChunkedSpec(**{"body": (HEADS,), **fields}),), Tokens(5)).check()
