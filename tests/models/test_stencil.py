"""Stencils: who sees whom, by brute force; block by block equals all at once; what it costs."""

import pytest
import torch
from tolerance import assert_close

from kizzasi.models.mixer import LayerContext
from kizzasi.models.mixers.attention import AttentionSpec
from kizzasi.models.ops.attention import document_positions
from kizzasi.models.ops.position_bias import distance_bucket
from kizzasi.models.ops.rope import rope_frequencies, rope_tables, rotate, xpos_scales
from kizzasi.models.ops.stencil import Places, Stencil, stencil_attention, stencil_attention_ref

STENCILS = {
    "window": Stencil(5),
    "window-1": Stencil(1),
    "wide": Stencil(70),
    "dilated": Stencil(4, 7),
    "strided": Stencil(None, 3),
    "block": Stencil(block=4),
    "ring": Stencil(block=16, n_blocks=2),
    "hybrid": Stencil(5, n_global=3),
    "all": Stencil(4, 2, n_global=1),
    "block-hybrid": Stencil(block=3, n_blocks=3, n_global=2),
}
every_stencil = pytest.mark.parametrize("stencil", STENCILS.values(), ids=STENCILS)


def sees(stencil, query, key):
    """The definition, one pair of positions of a document at a time."""
    age = query - key
    if age < 0:
        return False
    if key < stencil.n_global:
        return True
    if age % stencil.dilation:
        return False
    if stencil.window is not None:
        return age // stencil.dilation < stencil.window
    if stencil.block is not None:
        return query // stencil.block - key // stencil.block < stencil.n_blocks
    return True


@every_stencil
def test_what_is_visible_is_what_is_defined(stencil):
    t = 40
    places = Places(torch.zeros(1, t, dtype=torch.int64), torch.arange(t)[None])
    expected = torch.tensor([[sees(stencil, i, j) for j in range(t)] for i in range(t)])
    assert torch.equal(stencil.visible(places, places)[0, 0], expected)
    span = stencil.span
    if span is not None:  # and nothing else is remembered
        late = torch.arange(stencil.n_global, t)
        slots = stencil.slot(torch.arange(t))
        assert slots[: stencil.n_global].tolist() == list(range(stencil.n_global))
        assert torch.equal(slots[late[span:]], slots[late[:-span]])
        reach = [i - j for i in range(t) for j in late.tolist() if expected[i, j]]
        assert max(reach) == min(span, t - stencil.n_global) - 1


def after_a_ring(stencil, starts, seen):
    """Places of t tokens after rings that hold `seen` (b,) tokens, in the order of time."""
    slots, n_global = stencil.slots, stencil.n_global
    ring = seen[:, None] - stencil.span + torch.arange(stencil.span)
    first = torch.arange(n_global).expand(2, -1)
    ring, first = (
        torch.where(ring < n_global, -1, ring),
        torch.where(first < seen[:, None], first, -1),
    )
    before = torch.cat([first, ring], 1)
    document, position = document_positions(starts, seen)
    assert before.shape[1] == slots
    key = torch.cat([before.clamp(-1, 0), document], 1), torch.cat([before, position], 1)
    return Places(document, position), Places(*key)


@every_stencil
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("carried", [False, True])
def test_blocks_equal_the_whole(stencil, packed, carried):
    if carried and stencil.span is None:
        return
    planned = 0
    for t in (1, 63, 65, 150):
        starts = torch.zeros(2, t, dtype=torch.bool)
        if packed:
            starts[0, t // 3] = starts[1, t // 2] = starts[1, -1] = True
        if carried:
            query, key = after_a_ring(stencil, starts, torch.tensor([2, 40]))
        else:
            query = Places(*document_positions(starts, torch.zeros(2, dtype=torch.int64)))
            key = query
        n = key.position.shape[1]
        plan = stencil.plan(t, n - t, packed)
        if plan is None:
            continue
        planned += 1
        made = torch.Generator().manual_seed(t)
        leaves = [
            torch.randn(2, h, length, 3, generator=made, dtype=torch.float64, requires_grad=True)
            for h, length in ((2, t), (1, n), (1, n))
        ]
        results = []
        for attend in (stencil_attention, stencil_attention_ref):
            y = attend(
                *leaves,
                query,
                key,
                stencil,
                plan,
                bias=lambda far: far[:, None].double() * -0.1,
                sinks=torch.tensor([0.1, 0.2], dtype=torch.float64),
            )
            weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
            results.append((y, *torch.autograd.grad((y * weight).sum(), leaves)))
        for actual, expected in zip(*results, strict=True):
            assert_close(actual, expected)
    assert planned or (packed and stencil.n_global)  # there, blocks of one row hold two beginnings


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({"window": 64}, 2.1),
        ({"window": 256}, 1.6),
        ({"window": 32, "dilation": 4}, 2.1),
        ({"block": 64}, 2.1),  # half of a block is later
        ({"block": 32, "n_blocks": 2}, 1.5),
        ({"window": 64, "n_global": 8}, 2.1),
    ],
)
def test_a_stencil_costs_what_it_sees(fields, most):
    """At 2048 tokens the products are at most so many times the pairs that are seen."""
    t, heads = 2048, AttentionSpec(2, **fields)
    place = torch.arange(t)[None]
    places = Places(torch.zeros_like(place), place)
    pairs = int(heads.stencil.visible(places, places).sum())
    layer = LayerContext(16)
    scores = heads.cost(layer, t, 1).flops - AttentionSpec(2).cost(layer, t, 1).flops
    scores += 4 * 16 * t * t
    assert pairs <= scores / (4 * 16) <= most * pairs
    assert heads.cost(layer, t, 1).state_bytes == heads.stencil.slots * (2 * 16 * 4 + 8)


def test_buckets_of_t5():
    """By hand: 32 buckets up to 128, half of them exact."""
    far = torch.tensor([[[0, 1, 15, 16, 18, 19, 31, 64, 127, 128, 5000, -3]]])
    assert distance_bucket(far, 32, 128)[0, 0].tolist() == [
        *(0, 1, 15, 16, 16, 17, 21, 26, 31, 31, 31, 0)
    ]
    both = torch.tensor([[[0, 1, 7, 8, 200, -1, -7, -8, -200]]])
    found = distance_bucket(both, 32, 128, causal=False)[0, 0].tolist()
    assert found == [0, 1, 7, 8, 15, 17, 23, 24, 31]


def test_xpos_fades_with_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    frequencies = rope_frequencies(8, 1e4, device=torch.device("cpu"), dtype=torch.float64)

    def score(m, n, pair=None):
        at = [torch.tensor([[place]]) for place in (m, n)]
        turned = [rotate(x, *rope_tables(p, frequencies)) for x, p in zip((q, k), at, strict=True)]
        up, down = (xpos_scales(p, 8, 512, torch.float64) for p in at)
        return (turned[0] * up * turned[1] / down).sum()

    assert_close(score(900, 700), score(1300, 1100))
    scale = xpos_scales(torch.tensor([[512]]), 8, 512, torch.float64)[0, 0, 0]
    assert_close(scale[:4], torch.tensor([0.4, 0.65, 0.9, 1.15], dtype=torch.float64) / 1.4)
    assert torch.equal(scale[:4], scale[4:])
