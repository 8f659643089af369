"""Moves of layers, and the repair of a draw towards the bounds on parameters."""

import pytest

from kizzasi.errors import SpecError
from kizzasi.models import Signal, presets
from kizzasi.nas import Xorshift64
from kizzasi.nas.spaces.constraints import Constraints, Feasible
from kizzasi.nas.spaces.layer_moves import LayerMoves
from kizzasi.nas.spaces.model_space import ModelSpace
from kizzasi.nas.spaces.ready_made import hybrid, mamba_rwkv, tiny
from kizzasi.nas.spaces.template.parse import choice, repeat
from kizzasi.testing import check_space

HYBRID = hybrid()


def kinds(candidate) -> list[str]:
    return [block.to_dict()["mixer"]["kind"] for block in candidate.spec.blocks]


def mamba():
    candidate = HYBRID.encode(presets.at_size("mamba", 200_000, vocab_size=256))
    assert candidate is not None
    return candidate


def test_layers_are_inserted_deleted_exchanged_and_swapped():
    space, rng, parent = LayerMoves(HYBRID, share=1.0), Xorshift64(1), mamba()
    children = [space.mutate(parent, rng, 0.1) for _ in range(40)]
    assert {len(kinds(child)) for child in children} == {2, 3, 4}
    assert all(HYBRID.contains(child) for child in children)
    assert all(child.spec.d_model == parent.spec.d_model for child in children)
    mixed = [child for child in children if len(set(kinds(child))) == 2]
    assert mixed, "one step leads from equal layers to a hybrid"
    again = [space.mutate(mixed[0], rng, 0.1) for _ in range(40)]
    assert any(sorted(kinds(c)) == sorted(kinds(mixed[0])) != kinds(c) for c in again), "swapped"
    assert space.mutate(parent, rng, 0.0) == parent


def test_new_layers_come_from_those_given_as_often_as_from_the_space():
    other = HYBRID.sample(Xorshift64(5))
    space, rng = LayerMoves(HYBRID, [other], share=1.0), Xorshift64(2)
    layers = [space._layer(rng) for _ in range(200)]
    assert 70 < sum(layer in other.spec.blocks for layer in layers) < 140


def test_a_crossover_takes_first_and_last_layers():
    space, rng = LayerMoves(HYBRID, share=1.0), Xorshift64(3)
    a, b = mamba(), space.mutate(mamba(), rng, 0.1)
    while "attention" not in kinds(b):
        b = space.mutate(mamba(), rng, 0.1)
    found = [space.crossover(a, b, rng) for _ in range(20)]
    for child in found:
        ours = child.spec.blocks
        assert any(
            ours == (*a.spec.blocks[:n], *b.spec.blocks[len(b.spec.blocks) - m :])
            for n in range(1, len(a.spec.blocks) + 1)
            for m in range(1, len(b.spec.blocks) + 1)
        )
    assert space.crossover(a, a, rng) == a


def test_the_space_sits_its_exam():
    check_space(LayerMoves(tiny()))


@pytest.mark.parametrize(("space", "n_params"), [(mamba_rwkv(), 100_000), (HYBRID, 200_000)])
def test_a_draw_is_repaired_towards_the_band(space, n_params):
    """Unrepaired, a hundredth of mamba_rwkv's draws keep the band, and searches died of that."""
    feasible = Feasible(space, Constraints(params=(0.9 * n_params, 1.1 * n_params)))
    rng, kept = Xorshift64(1), 0
    for _ in range(12):
        draw = space.sample(rng)
        found = feasible.repaired(draw)
        sizes = [c.spec.cost(1).params for make in space.sizes(draw) if (c := make())]
        assert sizes == sorted(sizes)
        inside = [n for n in sizes if 0.9 * n_params <= n <= 1.1 * n_params]
        assert (found is not None) == bool(inside)
        if found is not None:
            kept += 1
            assert found.spec.cost(1).params in inside
            assert found.spec.blocks == draw.spec.blocks
    assert kept


def test_a_repair_makes_only_the_widths_it_looks_at(monkeypatch):
    """A draw of eleven widths was filled eleven times, which took most of a search's start."""
    space, made = mamba_rwkv(), []
    fill = ModelSpace._fill
    monkeypatch.setattr(ModelSpace, "_fill", lambda *a, **k: made.append(1) or fill(*a, **k))
    draw = space.sample(Xorshift64(3))
    made.clear()
    assert len(space.sizes(draw)) == 11
    assert not made
    assert Feasible(space, Constraints(params=(10, 11))).repaired(draw) is None
    assert 1 <= len(made) <= 4


def test_a_band_that_nothing_keeps_is_soon_known():
    """Of a draw that is too small and too large at neighbouring widths, no width need be judged."""
    space = LayerMoves(mamba_rwkv())
    feasible = Feasible(space, Constraints(params=(100_000.1, 100_000.2)))
    with pytest.raises(SpecError, match=r"none of 2,\d+ candidates.* and 3,\d+ of their other siz"):
        feasible.sample(Xorshift64(0))


def test_the_width_of_a_choice_of_models_is_found():
    block = {"mixer": {"kind": "mamba", "d_state": choice(4, 8)}}
    template = {"d_model": choice(8, 12), "stem": Signal(1, 1), "blocks": repeat(block, 1, 3)}
    two = ModelSpace(choice(template, {**template, "d_model": 16}))
    widths = {
        tuple(make().spec.d_model for make in two.sizes(two.sample(Xorshift64(n))))
        for n in range(9)
    }
    assert widths == {(8, 12), (16,)}
