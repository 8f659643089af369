"""Finalists at equal parameters, after equal time and at two sizes: figures by hand."""

import math
import statistics

import pytest
from made_up_runs import FINAL_TOKENS, complete_events, evolved_events, trial

from kizzasi.models import ModelSpec
from kizzasi.nas.report.model_card import model_card
from kizzasi.nas.report.pages import conclusions, html, markdown, summarise, table
from kizzasi.nas.report.tables import finalist_tables, param_rows, size_rows, time_rows
from kizzasi.nas.results.equal_terms import equal_params, equal_time, result_figures, turns
from kizzasi.nas.results.noise import noise_of

A, B, C = (f"{i:012x}" for i in (18, 19, 20))  # finals: 2.320, 2.324 (a tie) and 2.520
SIZES = {A: 206_200, B: 207_100, C: 208_000}
# What a doubling changes, by seed.
SLOPES = {A: (-0.10, -0.11, -0.12), B: (-0.30, -0.28, -0.29), C: (-0.15, -0.16, -0.14)}


def twin(final_trials, params, slopes, refusal=None):
    """The events of a finalist's twin with half of its parameters."""
    entry = {"id": final_trials[0]["candidate"]}
    trials = [
        {**trial(entry, "narrow", t["score"] - slope, FINAL_TOKENS, seed=t["seed"])}
        for t, slope in zip(final_trials, slopes, strict=False)
    ]
    trials = [{**t, "id": f"narrow-{t['id']}"} for t in trials]
    said = {"spec": None if refusal else {}, "params": None if refusal else params // 2}
    ids = [t["id"] for t in trials]
    event = {"event": "narrow", "candidate": entry["id"], "trials": ids, "refusal": refusal}
    return [{**event, **said}, *trials]


def finals_of(events, own):
    return [e for e in events if e.get("rung") == "final" and e["candidate"] == own]


def two_sizes(slopes=SLOPES, refusals=()):
    *events, result = evolved_events()
    added = [
        one for own, s in slopes.items() for one in twin(finals_of(events, own), SIZES[own], s)
    ]
    for own, why in refusals:
        added += twin(finals_of(events, own), SIZES[own], (), why)
    return [*events, *added, result]


def timed(events, speeds, loss):
    """The same run with other speeds and curves: speeds by finalist and seed."""

    def one(event):
        if event.get("rung") != "final" or event["candidate"] not in speeds:
            return event
        curve = [[t, loss(t)] for t in range(5_120, event["tokens"] + 1, 5_120)]
        return {
            **event,
            "curve": curve,
            "tokens_per_second": speeds[event["candidate"]][event["seed"]],
        }

    return [one(event) for event in events]


def test_slopes_by_hand():
    summary = summarise(two_sizes())
    assert [pair.slope.entry["id"] for pair in summary.sized] == [A, B, C]
    for pair in summary.sized:
        assert pair.slope.scores == pytest.approx(SLOPES[pair.final.entry["id"]])
        assert pair.doubled.mean == pytest.approx(
            pair.final.mean + statistics.fmean(SLOPES[pair.final.entry["id"]])
        )
    # A twin of a quarter: the same difference is shared by two doublings.
    quarter = [
        {**e, "params": SIZES[A] // 4} if e["event"] == "narrow" and e["candidate"] == A else e
        for e in two_sizes()
    ]
    assert summarise(quarter).sized[0].slope.mean == pytest.approx(-0.055)
    names = [row[0] for row in size_rows(summary)[1:]]
    assert names == ["child 19", "child 20", "child 18"]
    assert size_rows(summary)[1][1:] == [
        "207,100",
        "103,550",
        "2.614 ± 0.017",
        "-0.290 ± 0.010",
        "steepest",
        "2.034 ± 0.026",
        "best mean",
    ]
    assert size_rows(summary)[2][5] == "+0.140, flatter"
    assert size_rows(summary)[3][7] == "+0.176, worse"


def test_the_noise_of_slopes_and_of_double_size():
    summary = summarise(two_sizes())
    noise = noise_of([pair.slope for pair in summary.sized])
    rows = [SLOPES[own] for own in (A, B, C)]
    means, columns = (list(map(statistics.fmean, x)) for x in (rows, zip(*rows, strict=True)))
    whole = statistics.fmean(means)
    squares = sum(
        (y - means[i] - columns[s] + whole) ** 2
        for i, row in enumerate(rows)
        for s, y in enumerate(row)
    )
    assert noise.floor == pytest.approx(
        3.4954 * math.sqrt(squares / 4) * math.sqrt(2 / 3), rel=1e-4
    )
    said = " ".join(conclusions(summary))
    assert "child 19 -0.290 ± 0.010, child 20 -0.150 ± 0.010, child 18 -0.110 ± 0.010" in said
    assert f"child 19 gains most from size, by more than the noise floor of {noise}" in said
    assert [(a.entry["id"], b.entry["id"]) for a, b in turns(summary.sized)] == [(B, A)]
    assert "the order would turn: child 19 before child 18 (by 0.176, above the noise floor" in said
    assert "Two sizes do not make a law, and nothing of that size was trained." in said


def test_slopes_that_noise_does_not_tell_apart():
    noisy = {A: (-0.10, -0.30, -0.20), B: (-0.33, -0.15, -0.19), C: (-0.2, -0.2, -0.21)}
    said = " ".join(conclusions(summarise(two_sizes(noisy))))
    assert "child 19 gains most from size, but within the noise floor" in said
    assert "and so not told from: child 20, child 18." in said
    assert "child 19 before child 18 (by 0.019, within the noise floor" in said
    parallel = dict.fromkeys(SLOPES, (-0.1, -0.1, -0.1))
    assert "to twice the size, the order of these finalists stays as it is." in " ".join(
        conclusions(summarise(two_sizes(parallel)))
    )


def test_nobody_gains_from_size():
    worse = dict.fromkeys(SLOPES, (0.1, 0.2, 0.1))
    said = " ".join(conclusions(summarise(two_sizes(worse))))
    assert "Nobody gains from size on so many tokens." in said
    assert "gains most" not in said


def test_one_seed_at_the_second_size_knows_no_noise():
    summary = summarise(two_sizes({own: slopes[:1] for own, slopes in SLOPES.items()}))
    assert [len(pair.slope.scores) for pair in summary.sized] == [1, 1, 1]
    said = " ".join(conclusions(summary))
    assert "child 19 gains most from size, as far as a single seed can tell." in said
    assert "child 19 before child 18 (too few seeds to tell that from noise)" in said


def test_a_finalist_without_a_twin_says_why():
    slopes = {own: SLOPES[own] for own in (A, B)}
    events = two_sizes(slopes, [(C, "d_model: none below 8 makes about 10 parameters")])
    summary = summarise(events)
    assert size_rows(summary)[-1][:2] == ["child 20", "208,000"]
    assert size_rows(summary)[-1][5] == "d_model: none below 8 makes about 10 parameters"
    said = " ".join(conclusions(summary))
    assert "Not trained at a second size: child 20 (d_model: none below 8 makes about 10" in said
    failed = [
        {**e, "score": None, "failure": "diverged"}
        if e.get("rung") == "narrow" and e["candidate"] == A
        else e
        for e in two_sizes()
    ]
    assert size_rows(summarise(failed))[-1][5] == "failed"
    begun = [e for e in two_sizes()[:-1] if e.get("rung") != "narrow"]
    assert {row[5] for row in size_rows(summarise(begun))[1:]} == {"waiting"}


def test_at_equal_parameters_by_hand():
    """Without slopes: as they are within 2 %, and else not compared. With them: moved."""
    *events, result = complete_events()
    small, large = result["winner"], result["preset"]
    size = next(e["params"] for e in events if e.get("id") == large)
    events = [{**e, "params": round(size * 1.019)} if e.get("id") == small else e for e in events]
    (first, second) = param_rows(summarise([*events, result]))[1:]
    assert first[2:] == ["+1.9%", "2.320 ± 0.020", "best mean"]
    assert second[2:] == ["+0.0%", "2.420 ± 0.018", "+0.100, worse"]
    events = [{**e, "params": round(size * 1.08)} if e.get("id") == small else e for e in events]
    (first, second) = param_rows(summarise([*events, result]))[1:]
    assert (first[0], first[3:]) == ("mamba preset", ["2.420 ± 0.018", "best mean"])
    assert second[2:] == ["+8.0%", "-", "not compared"]
    params = round(size * 1.08)
    added = twin(finals_of(events, small), params, (-1.0, -1.0, -1.0))
    summary = summarise([*events, *added, result])
    (moved, _) = equal_params(summary.finals, summary.sized, size)
    doublings = math.log2(params / (params // 2))
    slope = -1.0 / doublings
    assert moved.scores == pytest.approx(
        [y + slope * math.log2(size / params) for y in (2.3, 2.32, 2.34)]
    )
    assert param_rows(summary)[1][2:] == ["+0.0%", "2.420 ± 0.018", "best mean"]
    assert param_rows(summary)[2][2:] == ["+8.0%", "2.431 ± 0.020", "+0.011, worse"]
    said = " ".join(conclusions(summary))
    assert f"At the {size:,} parameters of mamba preset: mamba preset 2.420 (best mean), " in said
    three = {A: SLOPES[A], B: SLOPES[B]}
    far = [{**e, "params": 300_000} if e.get("id") == C else e for e in two_sizes(three)]
    said = " ".join(conclusions(summarise(far)))
    assert "; not compared, without a slope or within 2%: child 20." in said


def test_after_equal_time_by_hand():
    """Curves that are straight in log tokens are read without an error."""
    speeds = {A: (1000.0, 900.0, 950.0), B: (2000.0, 1990.0, None), C: (500.0, 400.0, 300.0)}
    events = timed(evolved_events(), speeds, lambda t: 6.0 - 0.25 * math.log2(t))
    summary = summarise(events)
    rows = {row.final.entry["id"]: row for row in equal_time(summary.finals)}
    assert {own: row.tokens for own, row in rows.items()} == {
        A: FINAL_TOKENS // 2,
        B: FINAL_TOKENS,
        C: FINAL_TOKENS // 4,
    }
    assert rows[B].mean == summary.finals[1].mean
    assert rows[A].mean == pytest.approx(2.32 + 0.25)
    assert rows[C].mean == pytest.approx(2.52 + 0.5)
    assert max(row.error for row in rows.values()) < 1e-6
    assert [row[0] for row in time_rows(summary)[1:]] == ["child 19", "child 18", "child 20"]
    assert time_rows(summary)[3][1:] == [
        "300 .. 500",
        f"{FINAL_TOKENS // 4:,}",
        "3.020",
        "0.000",
        "+0.696, worse",
    ]
    said = " ".join(conclusions(summary))
    assert "After 131 s of training, the time of the fastest, child 19: child 19 2.324" in said
    assert "only for this machine; it decides nothing. Seeds of one finalist differed 1.7" in said
    # The clock turns this table round; the winner stays.
    assert summary.winner.entry["id"] == A == events[-1]["winner"]


def test_the_error_of_reading_a_curve():
    """Losses off the line by turns +-d: an error that widens what counts as tied."""

    def loss(tokens):
        return 6.0 - 0.25 * math.log2(tokens) + (0.25 if tokens // 5_120 % 2 else -0.25)

    slow = (1720.0,) * 3
    events = timed(evolved_events(), {A: slow, B: (2000.0,) * 3, C: slow}, loss)
    rows = {row.final.entry["id"]: row for row in equal_time(summarise(events).finals)}
    tokens = round(FINAL_TOKENS * 0.86)
    late = [t for t in range(5_120, FINAL_TOKENS + 1, 5_120) if t >= FINAL_TOKENS / 2]
    x, y = list(map(math.log2, late)), list(map(loss, late))
    b, a = statistics.linear_regression(x, y)
    squares = sum((v - a - b * u) ** 2 for u, v in zip(x, y, strict=True))
    standard = math.sqrt(squares / (len(x) - 2) / sum((u - statistics.fmean(x)) ** 2 for u in x))
    assert len(x) == 26
    doublings = math.log2(FINAL_TOKENS / tokens)
    assert rows[A].error == pytest.approx(2.0639 * standard * doublings, rel=1e-4)
    gap, floor = rows[A].mean - rows[B].mean, summarise(events).noise.floor
    assert floor < gap < floor + rows[A].error
    assert time_rows(summarise(events))[2][-1] == f"{gap:+.3f}, tied"
    short = timed(evolved_events(), {A: slow, B: (2000.0,) * 3, C: slow}, lambda t: 2.0)
    short = [{**e, "curve": e["curve"][-1:]} if e.get("candidate") == A else e for e in short]
    assert time_rows(summarise(short))[-1][3:] == ["-", "-", "the curve is too short"]


def test_nobody_without_a_speed_is_timed():
    scored = dict.fromkeys((A, B, C), (None, None, None))
    summary = summarise(timed(evolved_events(), scored, lambda t: 2.0))
    assert equal_time(summary.finals) == []
    assert time_rows(summary)[1:] == []


def test_every_page_says_all_of_it():
    summary = summarise(two_sizes())
    titles = [part.title for part in finalist_tables(summary)]
    assert titles == [
        "Finalists, token-matched",
        "Finalists, parameter-matched",
        "Finalists, time-matched",
        "Finalists at two sizes",
    ]
    entry = summary.winner.entry
    card = model_card(summary, ModelSpec.from_dict(entry["spec"]))
    for text in (markdown(summary), html(summary), card):
        for title in titles:
            assert title in text
        for said in (
            "-0.290 ± 0.010",
            "another machine gives another table",
            "child 19 gains most",
        ):
            assert said in text
    told = " ".join(table(summary).split())
    assert "gains most from size" in told
    assert "time of the fastest" in told


def test_a_journal_from_before_says_what_it_can():
    """No narrow events, no figures in the result, no slope_seeds in the config."""
    summary = summarise(evolved_events())
    assert (summary.twins, summary.sized) == ({}, ())
    assert "--slope-seeds does that" in markdown(summary)
    assert not [text for text in conclusions(summary) if "doubling" in text]
    assert len(param_rows(summary)) == len(time_rows(summary)) == 4


def test_the_result_holds_the_figures_that_no_clock_has_a_part_in():
    summary = summarise(two_sizes())
    figures = result_figures(summary.finals, summary.sized, SIZES[A], 1)
    assert figures == result_figures(
        summarise(timed(two_sizes(), dict.fromkeys((A, B, C), (1.0, 2.0, 3.0)), float)).finals,
        summary.sized,
        SIZES[A],
        1,
    )
    by = {one["candidate"]: one for one in figures["slopes"]["finalists"]}
    assert by[B]["mean"] == pytest.approx(-0.29)
    assert by[B]["spread"] == pytest.approx(0.01)
    doubled = {one["candidate"]: one["mean"] for one in figures["double_size"]["finalists"]}
    assert doubled[A] == pytest.approx(2.21)
    assert figures["double_size"]["noise"]["floor"] > 0
    assert figures["equal_params"]["params"] == SIZES[A]
    assert result_figures(summary.finals, (), SIZES[A], 1)["slopes"] is None
