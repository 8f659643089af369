"""Hypervolume: areas by hand and by counting, and what a report says of both fronts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_runs import complete_events

from kizzasi.nas.report.sentences import conclusions
from kizzasi.nas.results.hypervolume import Covered, covered, hypervolume
from kizzasi.nas.results.summary import summarise

CELLS = st.tuples(st.integers(0, 12), st.integers(0, 12))


def test_a_front_of_two_steps():
    assert hypervolume([(1, 3), (2, 1)], (4, 4)) == 3 * 1 + 2 * 2
    assert hypervolume([], (4, 4)) == hypervolume([(4, 0), (0, 5)], (4, 4)) == 0


@given(points=st.lists(CELLS, max_size=8))
@settings(max_examples=80, deadline=None)
def test_it_is_the_number_of_cells_that_some_point_dominates(points):
    cells = [(x, y) for x in range(10) for y in range(10)]
    counted = sum(any(a <= x and b <= y for a, b in points) for x, y in cells)
    assert hypervolume(points, (10, 10)) == counted


def scored(events, group, gain, size):
    """The run with one group's scores lowered and its states made larger."""
    own = {e["id"] for e in events if e["event"] == "candidate" and e["group"] == group}
    changed = []
    for event in events:
        if event["event"] == "candidate" and event["id"] in own:
            event = {**event, "state_bytes": event["state_bytes"] * size}
        if event["event"] == "trial" and event["candidate"] in own and event["score"]:
            event = {**event, "score": event["score"] - gain}
        changed.append(event)
    return summarise(changed)


def test_the_better_front_has_the_larger_share():
    events = complete_events()
    for gain, sign in ((1.0, -1), (-1.0, 1)):
        both = covered(scored(events, "preset", gain, 1), "state_bytes")
        assert both is not None
        assert sign * (both.searched - both.presets) > 0, both
        assert 0 < min(both) < max(both) <= 1


def test_a_single_point_that_is_best_in_both_has_all_of_the_box():
    events = complete_events()
    both = covered(scored(events, "preset", 5.0, 1e-6), "state_bytes")
    assert both is not None
    assert both.presets == pytest.approx(1)


def test_a_report_tells_both_shares():
    summary = summarise(complete_events())
    told = [text for text in conclusions(summary) if "Shares of the box" in text]
    both = covered(summary, "state_bytes")
    assert isinstance(both, Covered)
    assert f"state size {both.searched:.2f} and {both.presets:.2f}" in told[0]
    assert "latency" not in told[0], "nobody measured it"


def test_without_presets_nothing_is_told():
    events = complete_events()
    own = {e["id"] for e in events if e["event"] == "candidate" and e["group"] == "preset"}
    kept = [e for e in events if not {e.get("id"), e.get("candidate")} & own]
    assert covered(summarise(kept), "params") is None
