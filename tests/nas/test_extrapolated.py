"""Promotions by where learning curves go: what is read off a curve, and whom it lets through."""

import math
from statistics import fmean

import pytest
from small_search import SPACE, config, killed_after, outcome, write_text

from kizzasi.errors import SpecError
from kizzasi.nas import (
    Finals,
    Measurement,
    ModelSpace,
    Search,
    SearchConfig,
    choice,
    named_search,
)
from kizzasi.nas.results.foresight import foresight
from kizzasi.nas.schedulers import (
    ASHA,
    Extrapolated,
    Halving,
    Hyperband,
    Results,
    Schedule,
    StoppingASHA,
)
from kizzasi.nas.schedulers.extrapolated import expected, steepness
from kizzasi.nas.schedulers.schedule import FAILED
from kizzasi.nas.schedulers.simulate import SimulatedCurves, SimulatedTrainings, run_workers
from kizzasi.nas.searchers import AskTell, Grid
from kizzasi.testing import check_scheduler


def power(scale, b, end, n=20):
    return [(end * (i + 1) / n, scale * (end * (i + 1) / n) ** -b) for i in range(n)]


def test_a_power_law_is_read_and_carried_on():
    curve = power(9.0, 0.3, 100)
    assert steepness(curve) == pytest.approx(0.3)
    assert expected(-curve[-1][1], curve, 100, 300) == pytest.approx(-9 * 300**-0.3)
    early = [(t, 50.0 if t < 50 else loss) for t, loss in curve]  # only its end counts
    assert steepness(early) == pytest.approx(0.3)
    assert expected(-2.0, curve, 100, 300, trust=0.0) == -2.0


def test_what_tells_nothing_changes_nothing():
    assert steepness([]) is steepness([(5, 2.0)]) is steepness([(5, None), (6, 2.0)]) is None
    assert steepness([(5, 2.0), (10, 4.0)]) == 0  # it rises: no better later
    assert steepness([(5, 4.0), (10, 1e-9)]) == 1
    assert steepness([(5, math.inf), (10, 2.0), (20, 1.0)]) == pytest.approx(1)
    curve = power(9.0, 0.3, 100)
    assert expected(FAILED, curve, 100, 300) == FAILED
    assert expected(0.7, curve, 100, 300) == 0.7  # an accuracy is no loss


def told(*scored):
    results = Results()
    for candidate, (score, b) in enumerate(scored):
        results.add(candidate, score, power(-score * 9**b, b, 9))
    return results


def test_who_falls_fast_goes_before_who_rests():
    results = told((-3.0, 0.0), (-3.1, 0.0), (-3.4, 0.4))
    asha = ASHA(3, 9, 81)
    assert asha.survivors(results) == [0]
    assert Extrapolated(asha).survivors(results) == [2]
    assert Extrapolated(asha, trust=0.1).survivors(results) == [0]
    results.add(2, -2.0)
    assert results.view("raw", lambda *args: args[-1]).rung(1) == {2: -2.0}
    assert Extrapolated(asha).survivors(results) == []  # as many as were to go have gone


def test_the_last_score_is_what_was_seen():
    results = told((-3.0, 0.4), (-3.1, 0.0), (-3.4, 0.0))
    one = Extrapolated(ASHA(3, 9, 27))
    one.survivors(results)
    results.add(0, -2.9, power(-3, 0.4, 27))
    view = results.view(one, one._expected)
    assert view.rung(1) == {0: -2.9}
    assert view.rung(0)[0] == pytest.approx(-3 * 3**-0.4)


@pytest.mark.parametrize(
    "inner",
    [ASHA(30, 1, 27), StoppingASHA(30, 1, 27), Hyperband(1, 27), Halving((1, 3, 9, 27), 3, 30)],
    ids=repr,
)
def test_is_a_scheduler(inner):
    check_scheduler(Extrapolated(inner))


def regret(scheduler, seed):
    space = SimulatedCurves(143, seed, 729, late=0.05, noise=0.02)
    trainings = SimulatedTrainings(space.curve)
    schedule = Schedule(scheduler, AskTell(Grid(143), space))
    run_workers(schedule, trainings, 1, lambda job: 1.0, trainings.points)
    best = schedule.best()
    return space.regret(best[0].candidate if best else None), trainings.scored


def test_finds_slow_starters_that_scores_lose():
    asha = ASHA(143, 9, 729)
    alone = [regret(asha, seed) for seed in range(8)]
    led = [regret(Extrapolated(asha), seed)[0] for seed in range(8)]
    assert fmean(led) < 0.7 * fmean(r for r, _ in alone)
    assert regret(Extrapolated(asha, 0.0), 0) == alone[0]


def climbed(losses, slopes, later):
    """Trials of candidates whose curves fall as the slopes say."""
    for loss, b, last in zip(losses, slopes, later, strict=True):
        curve = power(loss * 9**b, b, 9)
        yield [
            {"rung": "0", "score": loss, "tokens": 9, "curve": curve},
            {"rung": "1", "score": last, "tokens": 27, "curve": curve},
        ]


def test_a_run_says_what_its_curves_were_worth():
    losses = [3 + 0.05 * i for i in range(9)]
    slopes = [0.02 * i for i in range(9)]
    later = [loss * 3**-b for loss, b in zip(losses, slopes, strict=True)]
    trials = list(climbed(losses, slopes, later))
    (one,) = foresight(trials)
    assert (one.rung, one.n, one.by_curves, one.by_scores) == (0, 9, 1.0, -1.0)
    assert "by 1.00 and the scores there by -1.00" in str(one)
    trials[0][1]["score"] = None
    assert foresight(trials)[0].n == 8
    assert foresight(trials[1:8]) == foresight([]) == []


def test_settings():
    with pytest.raises(SpecError, match="trust: 2"):
        Extrapolated(ASHA(3, 1, 3), 2.0).check()
    with pytest.raises(SpecError, match="n_candidates"):
        Extrapolated(ASHA(0, 1, 3)).check()


def steep(job, report):
    """The narrowest model is best at once; the widest falls fastest."""
    width, t = job.spec.d_model, job.budget
    b = 0.4 if width == 16 else 0.01
    return Measurement((3 + width / 20) * (t / 9) ** -b, t, curve=tuple(power(9.0, b, t)))


@pytest.mark.parametrize(("wrapped", "promoted"), [(False, 8), (True, 16)])
def test_a_search_promotes_by_curves(tmp_path, wrapped, promoted):
    block = {"mixer": {"kind": "mamba", "d_state": 4}}
    stem = {"kind": "tokens", "vocab_size": 8}
    models = ModelSpace({"d_model": choice(8, 12, 16), "stem": stem, "blocks": [block]})
    asha = ASHA(3, 9, 27)
    found = Search(
        models,
        steep,
        metric="loss",
        searcher=Grid(3),
        scheduler=Extrapolated(asha) if wrapped else asha,
        finals=Finals(seeds=1),
        folder=tmp_path / "run",
    ).run()
    further = [s for s in found.summary.standings if s.tried("1")]
    assert [s.entry["spec"]["d_model"] for s in further] == [promoted]


def test_a_search_resumes_along_its_curves(tmp_path):
    usual = {**config(write_text(tmp_path)).to_dict(), "searcher": "random", "scheduler": "asha"}
    own = {**usual, "n_pool": 3, "rungs": (512, 1536), "extrapolate": True, "final_tokens": 512}
    search = SearchConfig.from_dict({**own, "lrs": (3e-3,), "proxies": (), "score_windows": 8})
    named_search(search, tmp_path / "whole", SPACE)
    with killed_after(12):
        named_search(search, tmp_path / "killed", SPACE)
    named_search(search, tmp_path / "killed", SPACE, resume=True)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
