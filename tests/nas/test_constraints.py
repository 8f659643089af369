"""Hard constraints: what breaks one is refused with its rule, and is never built."""

import pytest
import torch

from kizzasi.errors import SpecError
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model, mixers
from kizzasi.nas import spaces
from kizzasi.nas.searchers import TPE, Grid, RegularizedEvolution, run
from kizzasi.nas.spaces import ModelSpace, constraints
from kizzasi.nas.spaces import device_cost as module
from kizzasi.nas.spaces.constraints import Constraints, Feasible, latency_ms, peak_memory_bytes
from kizzasi.nas.spaces.families import ArchSearchSpace
from kizzasi.nas.spaces.rng import Xorshift64

SPEC = ModelSpec(16, (BlockSpec(mixers.MambaSpec(d_state=4)),), Tokens(11))
COST = SPEC.cost(64)
ANALYTIC = {
    "params": COST.params,
    "active_params": COST.active_params,
    "flops_per_token": COST.flops / 64,
    "state_bytes": COST.state_bytes,
}


@pytest.fixture
def nothing_is_built(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("built")

    monkeypatch.setattr(module, "build_model", refuse)


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize("rule", ANALYTIC)
def test_analytic_rules_build_nothing(rule):
    value = ANALYTIC[rule]
    for bound in (value, (value, value), (value, None), (None, value), (None, None), None):
        assert Constraints(seq_len=64, **{rule: bound}).refusal(SPEC) is None
    for bound in (value - 1, (value + 1, None), (0, value - 1)):
        strict = Constraints(seq_len=64, latency_ms=1e9, **{rule: bound})
        refusal = strict.refusal(SPEC)
        assert refusal is not None
        assert (refusal.rule, refusal.value) == (rule, value)
        assert f"{rule}: " in str(refusal)
        assert " is outside " in str(refusal)


def test_measured_rules_come_last(monkeypatch):
    built = []
    monkeypatch.setattr(
        module, "build_model", lambda spec, **more: built.append(spec) or build_model(spec, **more)
    )
    few = {"seq_len": 8, "repeats": 1}
    assert Constraints(params=(1, 10**6), **few).refusal(SPEC) is None
    assert not built
    assert Constraints(latency_ms=1e9, peak_memory_bytes=10**9, **few).refusal(SPEC) is None
    for bounds in ({"latency_ms": 1e-9}, {"peak_memory_bytes": 1}):
        refusal = Constraints(**bounds, **few).refusal(SPEC)
        assert refusal is not None
        assert {refusal.rule} == bounds.keys()
    assert built == [SPEC] * 3


def test_measures():
    """Peak memory on a module whose needs are known: y, then z beside it, then z alone."""

    class Doubled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(10))

        def forward(self, x):
            y = x + 1
            z = torch.cat([y, y])
            del y
            z.add_(1)
            return z.view(2, -1)[1] * 1

    x = torch.zeros(1000)
    # 40 bytes of weight, 4000 of x; then 4000 of y and 8000 of z at once; later 8000 + 4000
    assert peak_memory_bytes(Doubled(), x) == 40 + 4000 + 12000  # pyright: ignore
    assert latency_ms(Doubled(), x, repeats=3) > 0  # pyright: ignore


def test_peak_memory_grows_with_length_and_is_repeatable():
    model = build_model(SPEC).eval()
    short, long = (torch.zeros(1, t, dtype=torch.int64) for t in (32, 256))
    assert peak_memory_bytes(model, short) == peak_memory_bytes(model, short)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert weights < peak_memory_bytes(model, short) < peak_memory_bytes(model, long)


@pytest.mark.cuda
def test_measures_on_cuda():
    bounds = {"seq_len": 64, "device": "cuda"}
    assert Constraints(latency_ms=1e6, peak_memory_bytes=10**10, **bounds).refusal(SPEC) is None
    refusal = Constraints(peak_memory_bytes=1, **bounds).refusal(SPEC)
    assert refusal is not None
    assert refusal.value > 4 * COST.params


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"params": (2, 1)}, "params: .* low is above high"),
        ({"seq_len": 0}, "seq_len: 0"),
        ({"repeats": 0}, "repeats: 0"),
    ],
)
def test_bad_bounds_are_refused(bounds, message):
    with pytest.raises(SpecError, match=message):
        Feasible(spaces.tiny(), Constraints(**bounds), stem=Tokens(9))


BAND = Constraints(params=(12_000, 20_000), state_bytes=100_000, seq_len=128)


@pytest.mark.usefixtures("nothing_is_built")
def test_every_move_is_feasible():
    space = Feasible(spaces.tiny(Tokens(64)), BAND, stem=Tokens(64))
    rng = Xorshift64(3)
    a, b = space.sample(rng), space.sample(rng)
    moves = [a, b, space.crossover(a, b, rng), *(space.mutate(a, rng, 0.5) for _ in range(5))]
    for candidate in moves:
        cost = candidate.to_spec(stem=Tokens(64)).cost(128)
        assert 12_000 <= cost.params <= 20_000
        assert cost.state_bytes <= 100_000
        assert space.contains(candidate)
    assert space.admitted >= len(set(moves))
    assert space.refused["params"] > 0
    assert f"{space.admitted} admitted; refused by rule: " in space.report()


@pytest.mark.usefixtures("nothing_is_built")
def test_searchers_run_over_the_feasible_part():
    space = Feasible(spaces.tiny(Tokens(64)), BAND, stem=Tokens(64))

    def evaluate(batch):
        return [-candidate.spec.cost(128).flops for candidate in batch]

    found = run(RegularizedEvolution(4, 2, 12, 0.3, seed=1), space, evaluate)
    found = [*found, *run(Grid(5), space, evaluate)]
    assert len(found) == 17
    assert all(space.contains(candidate) for candidate, _ in found)
    pytest.importorskip("optuna")
    assert all(space.contains(c) for c, _ in run(TPE(3, 2, seed=1), space, evaluate))


def test_sizes_count_the_feasible():
    whole = ArchSearchSpace((16, 32), (4, 24), (1, 2), ("mamba", "transformer"), (1.0,), (0.0,))
    space = Feasible(whole, Constraints(params=8000, seq_len=8), stem=Tokens(8))
    expected = []
    for candidate in whole.iterate():
        try:
            if candidate.exact_param_count(vocab_size=8) <= 8000:
                expected.append(candidate)
        except SpecError:
            continue
    assert list(space.iterate()) == expected
    assert list(space.iterate(2)) == expected[:2]
    assert list(space.iterate(0)) == []
    assert space.size == space.admitted == len(expected)
    # 24-wide heads divide neither width: 2 widths * 2 depths are no models.
    assert space.refused["invalid"] == 4
    assert space.refused.total() + space.admitted == whole.size


def few() -> ModelSpace:
    """24 models."""
    layer = {"kind": "mamba", "d_state": spaces.choice(4, 8)}, {"kind": "attention", "n_heads": 2}
    block = {"mixer": spaces.choice(*layer)}
    frame = {"d_model": spaces.choice(16, 24), "stem": {"kind": "tokens", "vocab_size": 9}}
    return ModelSpace({**frame, "blocks": spaces.repeat(block, 1, 2)})


class Counting(ModelSpace):
    drawn = 0

    def sample(self, rng):
        self.drawn += 1
        return super().sample(rng)


def counted(space: ModelSpace) -> Feasible:
    return Feasible(Counting(space.template), Constraints(params=10))


def test_an_empty_space_says_why():
    space, draws = counted(few()), few().size
    with pytest.raises(SpecError, match=f"none of {draws} candidates.*by rule: params {draws}\\)"):
        space.sample(Xorshift64(1))
    assert space.space.drawn == constraints.TRIES
    candidate = few().sample(Xorshift64(1))
    assert space.mutate(candidate, Xorshift64(1), 1.0) == candidate
    assert space.crossover(candidate, candidate, Xorshift64(1)) == candidate
    with pytest.raises(SpecError, match="breaks"):
        space.build(lambda gene, n: 0)


def test_a_narrow_band_never_ends_a_search_that_has_begun():
    """Once a candidate is known, draws in vain give a known one again."""
    space = Feasible(spaces.tiny(), BAND)
    known = space.sample(Xorshift64(1))
    space.admits = lambda candidate: False
    assert space.sample(Xorshift64(2)) == known


def test_of_a_large_empty_space_so_many_candidates_say_enough(monkeypatch):
    monkeypatch.setattr(constraints, "ENOUGH", 100)
    space = counted(spaces.tiny())
    with pytest.raises(SpecError, match=r"none of \d+ candidates"):
        space.sample(Xorshift64(1))
    assert space.space.drawn == constraints.TRIES


def test_the_rare_candidate_of_a_small_space_is_found(monkeypatch):
    space, rare = few(), few().iterate()[-1]
    monkeypatch.setattr(space, "sample", lambda rng: few().iterate(1)[0])
    params = rare.spec.cost(1).params
    assert Feasible(space, Constraints(params=(params, params))).sample(Xorshift64(1)) == rare
