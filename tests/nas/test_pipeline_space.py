"""The space of pipelines: typed moves, refusals, crossover, novelty; its members are sound."""

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model, presets
from kizzasi.models.channels import MLPSpec, MoESpec, SwiGLUSpec
from kizzasi.models.layers import ChunkedSpec, LoopSpec
from kizzasi.models.mixers import AttentionSpec, MambaSpec, RetentionSpec, RoutedSpec
from kizzasi.nas import RegularizedEvolution, Xorshift64
from kizzasi.nas.pipelines import PipelineSpace, Variant, to_pipeline
from kizzasi.nas.pipelines.space.fields import any_field, fields_of, redrawn
from kizzasi.nas.pipelines.space.moves import MOVES
from kizzasi.nas.pipelines.space.tree import RefusedError, at, put
from kizzasi.testing import check_model, check_searcher, check_space
from kizzasi.testing.model import first_leak, moved

STEM = Tokens(23)
ROUTED = RoutedSpec((AttentionSpec(n_heads=2, window=8), RetentionSpec(n_heads=2)), top_k=2)
SEEDS = (
    ModelSpec(16, (BlockSpec(AttentionSpec(n_heads=4), SwiGLUSpec(hidden=32)),) * 2, STEM),
    ModelSpec(24, (BlockSpec(MambaSpec(d_state=4)), BlockSpec(ROUTED, MLPSpec(hidden=32))), STEM),
)
ATTENDING = BlockSpec(AttentionSpec(n_heads=2))
RICH = SEEDS[1].replace(blocks=(*SEEDS[1].blocks, LoopSpec((ATTENDING,), 2), ATTENDING, ATTENDING))
SPACE = PipelineSpace(SEEDS, max_layers=6, max_width=64)


def test_it_sits_the_exam_of_spaces_and_serves_searchers():
    check_space(SPACE, STEM)
    check_space(PipelineSpace((presets.at_size("rwkv", 30_000, vocab_size=99),)))
    check_searcher(RegularizedEvolution(4, 2, 12, 0.3, 0), SPACE)


@pytest.mark.parametrize("name", MOVES)
def test_every_move_changes_the_model_or_says_why_not(name):
    start, made = Variant(RICH), 0
    for chance in range(1, 9):
        try:
            child = SPACE.child(start, Xorshift64(chance), name)
        except RefusedError:
            continue
        made += child.spec != start.spec
        assert child.moves == (name,)
        assert child.parents == (start.spec,)
        assert SPACE.contains(child)
    assert made, f"{name} never succeeds on a model that has all it needs"


def test_a_move_that_cannot_be_made_is_refused_with_its_reason():
    with pytest.raises(RefusedError, match="24 tries gave no other model; the last: window: there"):
        SPACE.child(Variant(SEEDS[0]), Xorshift64(1), "window")
    assert SPACE.moved(Variant(SEEDS[0]), Xorshift64(1), "window") == Variant(SEEDS[0])


# Fields that only go together with another one, which a single draw does not change.
BOUND = {
    "rope_scaling",  # its numbers must fit its method
    "parallel",  # of a layer without a channel
    "experts",  # as many as n_experts says
    "load_weight",  # of one router
    "shared_gate",  # of a shared expert
    "top_groups",  # of several groups
    "kv_from",  # a layer whose keys look alike
    "n_global",  # beside a window or blocks
    "kv_group",  # of keys in codes
    "n_blocks",  # of blocks
    "qkv_shared",  # of a low rank
}


def test_every_field_of_a_model_is_reached():
    spec = SEEDS[1].replace(
        blocks=(*SEEDS[1].blocks, BlockSpec(AttentionSpec(n_heads=2), MoESpec(n_experts=4)))
    )
    reached, fields = set(), set()
    for path, name, hint, value in fields_of(spec):
        field = f"{type(at(spec, path)).__name__}.{name}"
        fields.add(field)
        rng = Xorshift64(3)
        for _ in range(24):
            with contextlib.suppress(SpecError):
                other = put(spec, (*path, name), redrawn(value, hint, rng))
                other.check()
                assert other != spec
                reached.add(field)
                break
    assert {field.partition(".")[2] for field in fields - reached} <= BOUND
    drawn = {any_field(spec, Xorshift64(i)) for i in range(1, 30)}
    assert len(drawn) > 15
    assert spec not in drawn


def test_crossover_mixes_modules():
    a, b = map(Variant, SEEDS)
    wide = Variant(SEEDS[0].replace(d_model=24))
    children = {SPACE.crossover(wide, b, Xorshift64(i)) for i in range(1, 30)}
    kinds = {tuple(vars(block)["mixer"].kind for block in child.spec.blocks) for child in children}
    assert ("attention", "attention", "routed") in kinds
    assert ("mamba",) in kinds
    assert SPACE.crossover(a, a, Xorshift64(4)) == a


def test_novelty_weighs_numbers_by_their_ratio():
    a = Variant(SEEDS[0])
    wider = Variant(SEEDS[0].replace(d_model=32))
    heads = [replace(b, mixer=AttentionSpec(n_heads=2)) for b in SEEDS[0].blocks]
    fewer = Variant(SEEDS[0].replace(blocks=tuple(heads)))
    assert SPACE.novelty(a, []) == 1
    assert SPACE.novelty(a, [a]) == 0
    assert SPACE.novelty(wider, [a]) == pytest.approx(SPACE.novelty(fewer, [a]))
    assert SPACE.novelty(Variant(SEEDS[1]), [a]) > 4 * SPACE.novelty(wider, [a])


def test_seeds_are_checked_and_take_the_stem():
    space = PipelineSpace((SEEDS[0], SEEDS[1].replace(stem=Tokens(9))))
    assert {seed.stem for seed in space.seeds} == {STEM}
    with pytest.raises(SpecError, match="at least one model"):
        PipelineSpace(())
    with pytest.raises(SpecError, match=r"seeds\[0\]: d_model"):
        PipelineSpace((SEEDS[0].replace(d_model=-1),))
    assert not space.contains(Variant(SEEDS[0].replace(stem=Tokens(8))))
    assert not SPACE.contains(Variant(SEEDS[0].replace(blocks=SEEDS[0].blocks * 4)))


def test_random_pipelines_print_and_keep_every_contract():
    rng = Xorshift64(11)
    for _ in range(6):
        variant = Variant(rng.choice(SEEDS))
        for _ in range(rng.choice(range(1, 8))):
            variant = SPACE.moved(variant, rng)
        assert to_pipeline(variant.spec).spec == variant.spec
        check_model(variant.spec)


def test_a_move_gives_the_upper_layers_latent_bits_and_takes_them_away():
    moved = {MOVES["latent"](SEEDS[0], Xorshift64(i)) for i in range(1, 40)}
    found: list[Any] = [spec.blocks[-1] for spec in moved]
    assert {layer.inject for layer in found} == {("add",), ("film", "lora"), ("kv",)}
    assert {len(layer.body) for layer in found} == {1, 2}
    for spec in moved:
        assert MOVES["latent"](spec, Xorshift64(1)) == SEEDS[0]
    check_model(moved.pop())
    mamba: list[Any] = [MOVES["latent"](SEEDS[1], Xorshift64(i)).blocks[-1] for i in range(1, 40)]
    assert ("kv",) not in {layer.inject for layer in mamba}


def test_chance_is_no_fault():
    """Dropout draws as many numbers as there are chunks, a loop how often it runs, once a call."""
    block = SEEDS[1].blocks[0]
    chunked = SEEDS[1].replace(blocks=(ChunkedSpec((block,)),), dropout=0.1)
    check_model(chunked, splits=[])
    loop = LoopSpec((block,), 2, schedule="poisson_lognormal")
    check_model(SEEDS[1].replace(blocks=(loop,)), splits=[])


def test_the_mask_rule_of_the_seed_leaks_and_is_caught():
    """EvoForge's mask is the maximum of the causal one and a window on both sides."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 23, 8, dtype=torch.float64)

    def attend(x, leaky):
        t = x.shape[1]
        place = torch.arange(t)
        causal = place[:, None] >= place
        window = (place[:, None] - place).abs() <= 4
        seen = causal | window if leaky else causal & window
        scores = (q[x] @ k[x].mT).masked_fill(~seen, -torch.inf)
        return scores.softmax(-1) @ v[x]

    tokens = torch.randint(23, (1, 12))
    assert moved(lambda x: attend(x, False), tokens, 23) is None
    found = moved(lambda x: attend(x, True), tokens, 23)
    assert found is not None
    t, before = found
    assert 0 < t - before <= 4
    assert first_leak(SEEDS[1]) is None
    assert build_model(SEEDS[0], device="meta").n_params
