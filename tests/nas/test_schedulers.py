"""Schedulers do what their names say: steps spent, who goes on, failures, replay, workers."""

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kizzasi.errors import SpecError, StudyError
from kizzasi.nas.schedulers import (
    ASHA,
    PASHA,
    PDH,
    Halving,
    Hyperband,
    Instalment,
    Results,
    Schedule,
    StoppingASHA,
    geometric_budgets,
    run,
)
from kizzasi.nas.schedulers.simulate import Curve, SimulatedCurves, SimulatedTrainings, run_workers
from kizzasi.nas.searchers import AskTell, Evolution, Grid

N = 30
SCHEDULERS = [
    Halving((1, 3, 9, 27), 3, N),
    Hyperband(1, 27),
    Hyperband(1, 9, n_candidates=30),
    ASHA(N, 1, 27),
    StoppingASHA(N, 1, 27),
    PASHA(N, 1, 27),
    PASHA(N, 1, 81, eta=2),
    PASHA(N, 1, 27, epsilon=0.1),
    PDH(N, stages=(1, 3, 9, 27), generation=6, population_size=12),
]
every_scheduler = pytest.mark.parametrize("scheduler", SCHEDULERS, ids=repr)


def start(scheduler, n=200):
    """A schedule over candidates 0, 1, ..., n - 1 in this order."""
    return Schedule(scheduler, AskTell(Grid(n), SimulatedCurves(n, seed=0, horizon=27)))


def scored(*curves):
    """A schedule's jobs and steps, and its winner, when candidates have these curves in turn."""

    def play(scheduler):
        schedule, trainings = start(scheduler, len(curves)), SimulatedTrainings(curves.__getitem__)
        best = run(schedule, trainings).best()
        assert schedule.steps == trainings.steps
        return trainings.scored, best

    return play


def jobs_of(scheduler, score, n=200):
    schedule, jobs = start(scheduler, n), []

    def evaluate(candidate, budget):
        jobs.append((candidate, budget))
        return score(candidate, budget)

    run(schedule, evaluate)
    return jobs, schedule


def messy(seed):
    space = SimulatedCurves(200, seed, 27, crashing=0.4, diverging=0.4, noise=0.05)
    return SimulatedTrainings(space.curve)


def uneven(job):
    """Seconds of a job, for workers that overtake each other."""
    return job.budget * (1 + job.candidate * 7 % 5)


# --- steps spent are those of the definition


@pytest.mark.parametrize(
    ("n", "r", "last", "eta", "rungs"),
    [
        (27, 1, 27, 3, [(27, 1), (9, 3), (3, 9), (1, 27)]),
        (30, 2, 60, 3, [(30, 2), (10, 6), (3, 18), (1, 54)]),
        (100, 5, 79, 2, [(100, 5), (50, 10), (25, 20), (12, 40)]),
        (4, 7, 7, 3, [(4, 7)]),
    ],
)
def test_successive_halving_trains_n_over_eta_to_the_k_candidates_to_r_eta_to_the_k(
    n, r, last, eta, rungs
):
    jobs, schedule = jobs_of(
        Halving(geometric_budgets(r, last, eta), eta, n), lambda c, _: math.sin(c)
    )
    assert Counter(budget for _, budget in jobs) == {budget: count for count, budget in rungs}
    before = [0] + [budget for _, budget in rungs]
    closed = sum(count * (b - a) for (count, b), a in zip(rungs, before, strict=False))
    assert schedule.steps == closed
    best = sorted(range(n), key=lambda c: -math.sin(c))
    for count, budget in rungs:
        assert {c for c, b in jobs if b == budget} == set(best[:count])


def test_hyperband_has_the_brackets_of_the_paper():
    brackets = {
        (1, 3, 9, 27, 81): (81, 27, 9, 3, 1),
        (3, 9, 27, 81): (34, 11, 3, 1),
        (9, 27, 81): (15, 5, 1),
        (27, 81): (8, 2),
        (81,): (5,),
    }
    scheduler = Hyperband(1, 81)
    assert [(b, len(m)) for m, b in scheduler.brackets()] == [
        (b, n[0]) for b, n in brackets.items()
    ]
    jobs, schedule = jobs_of(scheduler, lambda c, _: math.sin(c))
    steps = 0
    for (members, budgets), counts in zip(scheduler.brackets(), brackets.values(), strict=True):
        own = Counter(budget for c, budget in jobs if c in members)
        assert own == dict(zip(budgets, counts, strict=True))
        steps += sum(n * (b - a) for n, a, b in zip(counts, (0, *budgets), budgets, strict=False))
    assert schedule.steps == steps == 1581
    assert len({c for c, _ in jobs}) == 143


def test_hyperband_goes_round_again_while_there_are_candidates():
    once = list(Hyperband(1, 9).brackets())
    assert once == [(range(9), (1, 3, 9)), (range(9, 14), (3, 9)), (range(14, 17), (9,))]
    scheduler = Hyperband(1, 9, n_candidates=40)
    again = [(range(m.start + 17, m.stop + 17), own) for m, own in once]
    assert list(scheduler.brackets()) == [*once, *again, (range(34, 40), (1, 3, 9))]
    jobs, schedule = jobs_of(scheduler, lambda c, _: math.sin(c))
    a_round = (9 + 3 * 2 + 6) + (5 * 3 + 6) + 3 * 9
    assert schedule.steps == 2 * a_round + 6 + 2 * 2
    assert len({c for c, _ in jobs}) == 40
    assert jobs_of(scheduler, lambda c, _: math.sin(c), n=17)[1].steps == a_round


def test_hyperband_spends_a_budget_of_steps_to_the_step():
    schedule = start(Hyperband(1, 9, n_candidates=10**6))
    while schedule.steps < 3 * 69:
        (job,) = schedule.ask()
        schedule.tell(job, math.sin(job.candidate))
    assert (schedule.steps, len(schedule.candidates)) == (3 * 69, 3 * 17)
    assert list(schedule.scheduler.survivors(schedule.results)) == []


def test_asha_promotes_n_over_eta_if_the_best_come_first():
    jobs, schedule = jobs_of(ASHA(27, 1, 27), lambda c, _: -c)
    assert Counter(b for _, b in jobs) == {1: 27, 3: 9, 9: 3, 27: 1}
    assert schedule.steps == 27 + 9 * 2 + 3 * 6 + 18


def test_asha_promotes_all_but_eta_minus_one_if_the_best_come_last():
    jobs, schedule = jobs_of(ASHA(27, 1, 27), lambda c, _: c)
    assert Counter(b for _, b in jobs) == {1: 27, 3: 25, 9: 23, 27: 21}
    assert schedule.steps == 27 + 25 * 2 + 23 * 6 + 21 * 18


def asha_by_the_paper(score, n, budgets, eta):
    """Algorithm 2 for one worker, word by word."""
    rungs, promoted, jobs, new = [{} for _ in budgets], [set() for _ in budgets], [], 0
    while True:
        for k in reversed(range(len(budgets) - 1)):
            order = sorted(rungs[k], key=lambda c: (-rungs[k][c], c))
            ready = [c for c in order[: len(rungs[k]) // eta] if c not in promoted[k]]
            if ready:
                candidate, rung = ready[0], k + 1
                promoted[k].add(candidate)
                break
        else:
            if new == n:
                return jobs
            candidate, rung, new = new, 0, new + 1
        rungs[rung][candidate] = score(candidate, budgets[rung])
        jobs.append((candidate, budgets[rung]))


@given(st.integers(1, 40), st.integers(2, 4), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_asha_follows_algorithm_2(n, eta, chance):
    table = {}

    def score(candidate, budget):
        return table.setdefault((candidate, budget), chance.randrange(12))

    jobs, _ = jobs_of(ASHA(n, 2, 2 * eta**3, eta), score)
    assert jobs == asha_by_the_paper(score, n, [2, 2 * eta, 2 * eta**2, 2 * eta**3], eta)


def test_stopping_asha_judges_once_against_those_before():
    jobs, schedule = jobs_of(StoppingASHA(9, 1, 9), lambda c, _: c)
    assert schedule.steps == 9 * 9, "each the best so far: all go on to the end"
    jobs, schedule = jobs_of(StoppingASHA(9, 1, 9), lambda c, _: -c)
    assert jobs == [(0, 1), (0, 3), (0, 9), *((c, 1) for c in range(1, 9))]
    scores = [5, 9, 8, 7, 6, 8.5]  # the last is the second best of six: 6 // 3 = 2 go on
    jobs, _ = jobs_of(StoppingASHA(6, 1, 3), lambda c, _: scores[c])
    assert [c for c, budget in jobs if budget == 3] == [0, 1, 5]


def test_pasha_keeps_two_rungs_while_the_ranking_stands_and_ends_with_all_if_it_never_does():
    jobs, _ = jobs_of(PASHA(81, 1, 27), lambda c, _: -c)
    assert Counter(b for _, b in jobs) == {1: 81, 3: 27}
    flips = {1: 1, 3: -1, 9: 1, 27: -1}
    jobs, _ = jobs_of(PASHA(81, 1, 27), lambda c, b: c * flips[b])
    assert max(b for _, b in jobs) == 27


def test_pasha_calls_scores_within_epsilon_equal():
    table = {1: [1.0, 0.95, 0.0, -1, -1, -1], 3: [1.0, 1.1]}  # 0 and 1 swap places
    for epsilon, top in ((0.04, 2), (0.06, 1)):
        scheduler = PASHA(6, 1, 9, epsilon=epsilon)
        _, schedule = jobs_of(scheduler, lambda c, b: table.get(b, [0, 0])[c])
        assert scheduler.top(schedule.results) == top


def test_pasha_takes_epsilon_from_those_that_swap_back_and_forth():
    rungs = [[4.0, 3.0, 2.0, 1.0], [3.0, 4.0, 2.0, 1.0], [4.5, 4.0, 1.0, 2.5], [4.0, 4.2, 1, 2]]
    scheduler, results = PASHA(4, 1, 8, eta=2), Results()
    seen = []
    for scores in rungs:
        for candidate, score in enumerate(scores):
            results.add(candidate, score)
        seen.append((scheduler.top(results), scheduler.tolerance(results)))
    # 0 and 1 swap at the second rung and back at the third, 2 and 3 at the third alone.
    assert seen[:3] == [(1, 0.0), (2, 0.0), (3, 0.5)]
    # On the fourth, 0 and 1 are 0.2 apart after a third swap, 2 and 3 have not swapped again.
    assert seen[3] == (3, pytest.approx(0.2))


def pasha_by_the_paper(score, n, budgets, eta):
    """Algorithm 1 for one worker, everything anew after each result: jobs, epsilon."""
    rungs, jobs, new, top, epsilon = [{} for _ in budgets], [], 0, 1, 0.0

    def order(rung, a, b):
        return np.sign(rungs[rung][a] - rungs[rung][b])

    def best_first(rung, among):
        sound = [c for c in among if rungs[rung][c] != -math.inf]
        return sorted(sound, key=lambda c: (-rungs[rung][c], c))

    def is_noisy(a, b):
        now, pairs = order(top, a, b), [(i, j) for j in range(top) for i in range(j)]
        return now and any(order(i, a, b) == now == -order(j, a, b) for i, j in pairs)

    while True:
        for k in reversed(range(top)):
            best = best_first(k, rungs[k])[: len(rungs[k]) // eta]
            if ready := [c for c in best if c not in rungs[k + 1]]:
                candidate, rung = ready[0], k + 1
                break
        else:
            if new == n:
                return jobs, epsilon
            candidate, rung, new = new, 0, new + 1
        rungs[rung][candidate] = score(candidate, budgets[rung])
        jobs.append((candidate, budgets[rung]))
        now = best_first(top, rungs[top])
        gaps = [
            abs(rungs[top][a] - rungs[top][b]) for a, b in combinations(now, 2) if is_noisy(a, b)
        ]
        epsilon = np.percentile(gaps, 90) if gaps else epsilon
        pairs = zip(now, best_first(top - 1, now), strict=True)
        if any(abs(rungs[top - 1][a] - rungs[top - 1][b]) > epsilon for a, b in pairs):
            top = min(top + 1, len(budgets) - 1)


@given(st.integers(1, 24), st.integers(2, 3), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_pasha_follows_algorithm_1_and_its_estimate_of_epsilon(n, eta, chance):
    table, noise, failing = {}, chance.choice([0.02, 0.3]), chance.choice([0, 0.1])
    digits = chance.choice([1, 9])  # with and without ties

    def score(candidate, budget):
        if (candidate, budget) not in table:
            far = min(max(chance.gauss(0, noise), -9.0), 9.0)  # hypothesis may draw 1e308
            value = round(math.sin(candidate) + far, digits)
            table[candidate, budget] = -math.inf if chance.random() < failing else value
        return table[candidate, budget]

    budgets, scheduler = [2 * eta**k for k in range(5)], PASHA(n, 2, 2 * eta**4, eta)
    jobs, schedule = jobs_of(scheduler, score)
    found = jobs, scheduler.tolerance(schedule.results)
    assert found == pasha_by_the_paper(score, n, budgets, eta)


def test_pdh_sets_each_hurdle_at_the_mean_of_those_trained_furthest():
    scheduler = PDH(12, stages=(10, 20, 30), generation=3, population_size=100)
    table = {
        10: [1, 2, 6, 3, 4, 2, 5, 8, 9, 3.5, 3, 7],
        20: {4: 10, 6: 14, 7: 11, 8: 20, 9: 13, 11: 15},
        30: dict.fromkeys((6, 7, 8, 9, 11), 21),
    }
    jobs, schedule = jobs_of(scheduler, lambda c, b: table[b][c])
    # h_0 = (1 + 2 + 6) / 3 after candidate 2; h_1 after candidate 5, of candidate 4 alone.
    assert scheduler.hurdles(schedule.results) == [3.0, 10.0]
    first = [(0, 10), (1, 10), (2, 10), (3, 10), (4, 10), (4, 20), (5, 10)]
    assert jobs[:10] == [*first, (6, 10), (6, 20), (6, 30)]
    assert [c for c, b in jobs if b == 20] == [4, 6, 7, 8, 9, 11]
    assert [c for c, b in jobs if b == 30] == [6, 7, 8, 9, 11]
    assert schedule.steps == 12 * 10 + 6 * 10 + 5 * 10


def test_pdh_lets_the_oldest_leave_the_population():
    scheduler = PDH(8, stages=(1, 2), generation=4, population_size=2)
    _, schedule = jobs_of(scheduler, lambda c, b: [100, 100, 1, 3, 2.5, 2, 1, 0][c] + b)
    assert scheduler.hurdles(schedule.results) == [3.0]
    assert [c for c, rung, _ in schedule.results.told if rung] == [4]


# --- late bloomers


GOOD, BAD, BLOOMER = Curve(5.0, 4.0), Curve(3.0, 40.0), Curve(6.5, 9.0)
LATE = (GOOD, GOOD, BAD, BAD, BAD, BAD, BLOOMER, BAD, BAD)


@pytest.mark.parametrize(
    ("scheduler", "finds"),
    [
        (Halving((6, 18, 54), 3, 9), True),
        (ASHA(9, 6, 54), True),
        (PASHA(9, 6, 54), True),
        (PDH(9, (6, 18), generation=6, population_size=9), True),
        (StoppingASHA(9, 6, 54), False),
    ],
    ids=repr,
)
def test_who_finds_the_late_bloomer(scheduler, finds):
    crossing = GOOD.crossing(BLOOMER)
    assert 6 < crossing < 18, "behind at the first rung, ahead from the second on"
    _, (job, _) = scored(*LATE)(scheduler)
    assert (job.candidate == 6) == finds


# --- failures


@every_scheduler
@pytest.mark.parametrize("seed", range(4))
def test_failures_never_win_and_never_stop_the_study(scheduler, seed):
    trainings = messy(seed)
    schedule = run(start(scheduler), trainings)
    failed = {c for c, _, score in schedule.results.told if score == -math.inf}
    assert len(failed) > 1
    for candidate in failed:
        scores = schedule.results.scores(candidate)
        assert -math.inf not in scores[:-1], "trained on after it failed"
    job, score = schedule.best()
    assert job.candidate not in failed
    assert math.isfinite(score)
    assert schedule.steps >= trainings.steps


@every_scheduler
@pytest.mark.parametrize("failure", [None, math.nan, math.inf, -math.inf])
def test_a_study_in_which_all_fail_ends_with_no_winner(scheduler, failure):
    jobs, schedule = jobs_of(scheduler, lambda c, b: failure)
    assert schedule.best() is None
    assert {c for c, _ in jobs} == set(range(len(jobs)))


def test_a_failed_candidate_is_not_in_the_population_mean():
    scheduler = PDH(8, stages=(1, 2), generation=3, population_size=8)
    _, schedule = jobs_of(scheduler, lambda c, b: [1, math.nan, 2, None, 6, 4, 3, 2][c])
    assert scheduler.hurdles(schedule.results) == [3.0]
    assert [c for c, rung, _ in schedule.results.told if rung] == [5]


@pytest.mark.parametrize("seed", range(4))
def test_who_failed_at_any_stage_is_neither_in_the_population_nor_in_a_hurdle(seed):
    scheduler = PDH(60, stages=(1, 9, 27), generation=3, population_size=12)
    space = SimulatedCurves(60, seed, 27, crashing=0.2, diverging=0.2)
    results = run(start(scheduler), SimulatedTrainings(space.curve)).results
    failed = {candidate for candidate, _, score in results.told if score == -math.inf}
    assert max(len(results.scores(candidate)) for candidate in failed) > 1
    sound = Results()
    for candidate, _, score in results.told:
        if candidate not in failed:
            sound.add(candidate, score)
    assert len(scheduler.hurdles(sound)) > 1
    assert scheduler.hurdles(sound) == scheduler.hurdles(results)


def test_who_failed_later_is_not_the_best():
    table = {1: [3, 2, 1], 3: [None]}
    _, schedule = jobs_of(ASHA(3, 1, 3), lambda c, b: table[b][c])
    assert schedule.best() == (Instalment(1, 1), 2)


def test_the_best_is_the_best_at_any_budget_and_of_equals_the_first():
    table = {1: [3, 5, 1], 3: [3, 4, 5]}
    _, schedule = jobs_of(ASHA(3, 1, 3), lambda c, b: table[b][c])
    assert schedule.best() == (Instalment(1, 1), 5)


def test_of_equals_the_earlier_one_goes_on():
    jobs, _ = jobs_of(ASHA(9, 1, 9), lambda c, b: 0.0)
    assert [c for c, b in jobs if b == 3] == [0, 1, 2]
    jobs, _ = jobs_of(Halving((1, 3, 9), 3, 9), lambda c, b: 0.0)
    assert [c for c, b in jobs if b > 1] == [0, 1, 2, 0]


# --- workers, replay


@every_scheduler
@pytest.mark.parametrize("n_workers", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_no_worker_repeats_another(scheduler, n_workers, seed):
    trainings = messy(seed)
    schedule = start(scheduler)
    run_workers(schedule, trainings, n_workers, uneven)
    assert len(set(trainings.scored)) == len(trainings.scored) == len(schedule.results.told)
    assert schedule.running == {}
    for candidate in range(len(schedule.candidates)):
        own = [b for c, b in trainings.scored if c == candidate]
        assert own == list(scheduler.budgets(candidate)[: len(own)]) != []


@pytest.mark.parametrize("scheduler", SCHEDULERS[:2], ids=repr)
def test_synchronous_schedulers_decide_the_same_with_any_number_of_workers(scheduler):
    alone, together = messy(0), messy(0)
    run(start(scheduler), alone)
    run_workers(start(scheduler), together, 4, uneven)
    assert sorted(alone.scored) == sorted(together.scored)


def recorded(schedule, upto=None):
    return [
        (Instalment(candidate, schedule.scheduler.budgets(candidate)[rung]), score)
        for candidate, rung, score in schedule.results.told[:upto]
    ]


@every_scheduler
def test_a_replayed_study_goes_on_as_if_never_stopped(scheduler):
    whole = run(start(scheduler), messy(1))
    n = len(whole.results.told)
    scores = dict(recorded(whole))
    for cut in (0, 1, n // 3, n // 2, n - 1, n):
        schedule = start(scheduler)
        schedule.replay(recorded(whole, cut))
        run(schedule, lambda c, b: scores[Instalment(c, b)])
        assert schedule.results.told == whole.results.told
        assert (schedule.steps, schedule.best()) == (whole.steps, whole.best())


@every_scheduler
def test_a_study_of_many_workers_resumes_from_its_record_alone(scheduler):
    whole = start(scheduler)
    run_workers(whole, messy(2), 4, uneven)
    n = len(whole.results.told)
    for cut in (1, n // 4, n // 2, n - 1):
        history, pair = recorded(whole, cut), (start(scheduler), start(scheduler))
        for schedule in pair:
            schedule.replay(history)
        assert pair[0].ask(4) == pair[1].ask(4) != []
        trainings = messy(2)
        for job, _ in history:
            trainings(job.candidate, job.budget)
        resumed = start(scheduler)
        resumed.replay(history)
        run_workers(resumed, trainings, 3, uneven)
        assert len(set(trainings.scored)) == len(trainings.scored)
        assert len(resumed.candidates) == len(whole.candidates)


def test_a_job_cut_short_is_asked_anew_before_new_candidates():
    schedule = start(ASHA(9, 1, 9))
    jobs = schedule.ask(4)
    assert jobs == [Instalment(c, 1) for c in range(4)]
    resumed = start(ASHA(9, 1, 9))
    resumed.replay([(jobs[1], 0.5), (jobs[3], 0.25)])
    assert resumed.ask(3) == [Instalment(0, 1), Instalment(2, 1), Instalment(4, 1)]


@pytest.mark.parametrize(
    "history",
    [
        [(Instalment(0, 2), 1.0)],
        [(Instalment(0, 1), 1.0)] * 2,
        [(Instalment(9, 1), 0.0)],
        [(Instalment(300, 1), 0)],
    ],
)
def test_the_record_of_another_study_is_refused(history):
    with pytest.raises(StudyError, match=r"history: result \d is of Instalment"):
        start(ASHA(9, 1, 9)).replay(history)


def test_only_a_running_job_can_be_told():
    schedule = start(ASHA(9, 1, 9))
    (job,) = schedule.ask()
    for wrong in (Instalment(0, 3), Instalment(1, 1)):
        with pytest.raises(StudyError, match="is not running"):
            schedule.tell(wrong, 0.0)
    schedule.tell(job, 0.0)
    with pytest.raises(StudyError, match="is not running"):
        schedule.tell(job, 0.0)


# --- searchers


@every_scheduler
def test_a_searcher_that_ends_early_ends_the_study_in_good_order(scheduler):
    jobs, schedule = jobs_of(scheduler, lambda c, b: -c, n=10)
    assert {c for c, _ in jobs} == set(range(10))
    if isinstance(scheduler, Halving):
        assert Counter(b for _, b in jobs) == {1: 10, 3: 3, 9: 1, 27: 1}
    assert schedule.ask(3) == []


@every_scheduler
@pytest.mark.parametrize("n_workers", [1, 4])
def test_evolution_is_told_each_candidate_once_and_in_order(scheduler, n_workers):
    space = SimulatedCurves(10**6, seed=5, horizon=27, crashing=0.1, noise=0.05)
    searcher = Evolution(6, 20, 3, mutation_prob=1.0, seed=4)  # distinct candidates, nearly surely
    schedule = Schedule(scheduler, AskTell(searcher, space))
    run_workers(schedule, SimulatedTrainings(space.curve), n_workers, uneven)
    history = schedule.search.history
    assert schedule.candidates[: len(history)] == [candidate for candidate, _ in history]
    assert len(history) >= len(schedule.candidates) - 1
    for candidate, score in enumerate(history.scores):
        assert score in schedule.results.scores(candidate)
    if isinstance(scheduler, (PDH, StoppingASHA)):
        final = [schedule.results.scores(candidate)[-1] for candidate in range(len(history))]
        assert history.scores == final


# --- settings


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (Halving((1, 3, 9, 27), 3, 26), "n_candidates: 26 leave nobody for the budget 27"),
        (Halving((0, 1), 3, 27), r"rungs: \(0, 1\) must be rising"),
        (Hyperband(9, 8), "max_budget: 8"),
        (Hyperband(1, 9, n_candidates=0), "n_candidates: 0"),
        (ASHA(9, 1, 27, eta=1), "eta: 1"),
        (StoppingASHA(0, 1, 27), "n_candidates: 0"),
        (PASHA(9, 1, 27, epsilon=math.nan), "epsilon: nan"),
        (PASHA(9, 1, 27, epsilon=-1), "epsilon: -1"),
        (PDH(9, (), 3, 9), r"stages: \(\)"),
        (PDH(9, (2, 2), 3, 9), r"stages: \(2, 2\)"),
        (PDH(6, (1, 2, 3), 3, 9), "n_candidates: 6 end before the budget 3"),
        (PDH(9, (1, 2, 3), 0, 9), "generation: 0"),
        (PDH(9, (1, 2, 3), 3, 0), "population_size: 0"),
    ],
    ids=repr,
)
def test_a_bad_setting_is_named(scheduler, message):
    with pytest.raises(SpecError, match=message):
        start(scheduler)


@every_scheduler
def test_nothing_told_means_nobody_goes_on(scheduler):
    assert list(scheduler.survivors(Results())) == []
