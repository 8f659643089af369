"""Simulated trainings: curves with a known truth, failures, and a simulated clock."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kizzasi.errors import SpecError
from kizzasi.nas.schedulers import ASHA, Schedule
from kizzasi.nas.schedulers.simulate import (
    UNIFORM,
    Curve,
    SimulatedCurves,
    SimulatedTraining,
    SimulatedTrainings,
    run_workers,
)
from kizzasi.nas.searchers import AskTell, Evolution, Grid, Random

SPACE = SimulatedCurves(40, seed=3, horizon=81, crashing=0.2, diverging=0.2, noise=0.05)


def test_a_curve_starts_at_the_start_halves_at_half_and_ends_at_the_drop():
    curve = Curve(drop=5.0, half=30.0)
    assert curve.loss(0) == UNIFORM
    assert curve.loss(30) == UNIFORM - 2.5
    assert curve.loss(1e9) == pytest.approx(UNIFORM - 5)


def test_the_crossing_is_where_the_losses_are_equal():
    steady, late = Curve(drop=5.0, half=5.0), Curve(drop=6.5, half=40.0)
    crossing = steady.crossing(late)
    assert crossing == late.crossing(steady)
    assert steady.loss(crossing) == pytest.approx(late.loss(crossing))
    assert steady.loss(crossing - 1) < late.loss(crossing - 1)
    assert steady.loss(crossing + 1) > late.loss(crossing + 1)
    assert steady.crossing(Curve(drop=4.0, half=5.0)) is None
    assert steady.crossing(Curve(drop=5.0, half=6.0)) is None


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_a_training_in_instalments_equals_one_in_a_piece(instalments):
    curve = Curve(drop=5.0, half=9.0, noise=0.3, seed=8)
    training, whole = SimulatedTraining(curve), SimulatedTraining(curve)
    for steps in instalments:
        assert training.run(training.step + steps) is None
    whole.run(sum(instalments))
    assert (training.step, training.score()) == (whole.step, whole.score())
    assert training.score() == training.score()


def test_noise_has_its_standard_deviation_and_no_bias():
    errors = []
    for seed in range(2000):
        training = SimulatedTraining(Curve(drop=5.0, half=9.0, noise=0.3, seed=seed))
        training.run(9)
        errors.append(training.score() - training.curve.loss(9))
    mean = sum(errors) / len(errors)
    assert abs(mean) < 4 * 0.3 / math.sqrt(len(errors))
    assert sum(e * e for e in errors) / len(errors) == pytest.approx(0.09, rel=0.15)


def test_failures_come_at_their_step_and_stop_the_training_there():
    trainings = SimulatedTrainings(
        lambda c: Curve(5.0, 9.0, crashes_at=5) if c else Curve(5.0, 9.0, diverges_at=7)
    )
    assert [trainings(c, 4) is None for c in (0, 1)] == [False, False]
    assert trainings(0, 20) is trainings(1, 20) is None
    assert trainings.steps == 5 + 7
    with pytest.raises(RuntimeError, match="crash at step 5"):
        SimulatedTraining(Curve(5.0, 9.0, crashes_at=5)).run(5)
    assert "divergence at step 7" in (
        SimulatedTraining(Curve(5.0, 9.0, diverges_at=7)).run(9) or ""
    )


def test_nothing_is_trained_twice():
    training = SimulatedTraining(Curve(5.0, 9.0))
    training.run(9)
    with pytest.raises(AssertionError, match="trained to 9 steps already"):
        training.run(9)


def test_curves_depend_on_their_seed_and_number_alone():
    larger = SimulatedCurves(400, seed=3, horizon=81, crashing=0.2, diverging=0.2, noise=0.05)
    curves = [SPACE.curve(i) for i in reversed(range(40))][::-1]
    assert curves == [larger.curve(i) for i in range(40)]
    assert len({larger.curve(i).drop for i in range(400)}) == 400
    other = SimulatedCurves(40, seed=4, horizon=81)
    assert other.curve(0).drop != SPACE.curve(0).drop


def test_a_family_has_its_shares_and_late_bloomers_win():
    family = SimulatedCurves(2000, 0, horizon=729, late=0.1, crashing=0.2, diverging=0.05)
    curves = [family.curve(i) for i in range(2000)]
    late = [c for c in curves if c.drop > 6.2]
    assert len(late) / 2000 == pytest.approx(0.1, abs=0.03)
    assert sum(c.crashes_at is not None for c in curves) / 2000 == pytest.approx(0.2, abs=0.03)
    assert sum(c.diverges_at is not None for c in curves) / 2000 == pytest.approx(0.05, abs=0.02)
    steady = [c for c in curves if c.drop <= 6.2]
    assert max(c.loss(729) for c in late) < min(c.loss(729) for c in steady)
    ahead = [sum(s.loss(9) < c.loss(9) for s in steady) / len(steady) for c in late]
    assert 0.2 < sum(ahead) / len(ahead) < 0.6


def test_regret_is_measured_from_the_best_that_does_not_fail():
    regrets = [SPACE.regret(i) for i in range(40)]
    sound = [i for i in range(40) if SPACE.curve(i).crashes_at is SPACE.curve(i).diverges_at]
    assert 0 < len(sound) < 40
    assert min(regrets) == min(regrets[i] for i in sound) == 0
    assert SPACE.regret(None) == max(UNIFORM - SPACE.curve(i).loss(81) for i in sound)
    assert {regrets[i] for i in set(range(40)) - set(sound)} == {SPACE.regret(None)}


@pytest.mark.parametrize(
    "searcher", [Grid(40), Random(9, 1), Evolution(4, 3, 2, mutation_prob=0.5, seed=2)]
)
def test_a_family_is_a_space(searcher):
    search = AskTell(searcher, SPACE)
    while batch := search.ask():
        assert all(SPACE.contains(candidate) for candidate in batch)
        search.tell([-SPACE.regret(candidate) for candidate in batch])
    assert not SPACE.contains(40)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 0},
        {"horizon": 0},
        {"late": 1.1},
        {"noise": -1},
        {"crashing": 0.6, "diverging": 0.6},
    ],
)
def test_a_bad_setting_is_named(settings):
    with pytest.raises(SpecError, match=next(iter(settings))):
        SimulatedCurves(**{"size": 4, "seed": 0, "horizon": 9, **settings}).check()


@given(st.integers(1, 6), st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_the_clock_runs_as_many_jobs_at_once_as_there_are_workers(n_workers, seed):
    space = SimulatedCurves(20, seed, horizon=9)
    schedule = Schedule(ASHA(20, 9, 9), AskTell(Grid(20), space))
    busy = []

    def evaluate(candidate, budget):
        busy.append(len(schedule.running))
        return 0.0

    seconds = run_workers(schedule, evaluate, n_workers, lambda job: 2.0)
    assert seconds == 2.0 * -(-20 // n_workers)
    assert max(busy) == n_workers
