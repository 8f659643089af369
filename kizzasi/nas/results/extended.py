"""A search that was given more: more candidates, finalists or seeds, on the journal it has.

extended   config {setting: value}: budgets that grew when the run was resumed. Results before it
           are of the smaller search, and count no more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Event = dict[str, Any]


def current(events: Iterable[Event]) -> list[Event]:
    """The events as if the search had had its present budgets from the start."""
    events = list(events)
    grown = [i for i, event in enumerate(events) if event["event"] == "extended"]
    if not grown:
        return events
    config: dict[str, Any] = {}
    for i in grown:
        config |= events[i]["config"]
    kept = [e for i, e in enumerate(events) if e["event"] != "result" or i > grown[-1]]
    return [
        {**e, "config": {**e["config"], **config}} if e["event"] == "study" else e for e in kept
    ]
