"""What a journal's events are made of, field by field: the one place that looks at them first.

The kinds and their fields are told in `kizzasi.nas.study.study`. Fields and kinds that are not
listed here pass, so that journals of later versions can be read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from kizzasi.documents import cut
from kizzasi.errors import StudyError
from kizzasi.nas.results.finals import APART

Event = dict[str, Any]
Check = Callable[[Any], str | None]  # None, or what was expected
MOST = 2**64


def text(value: Any) -> str | None:
    return None if isinstance(value, str) else "expected a text"


def whole(value: Any) -> str | None:
    right = isinstance(value, int) and not isinstance(value, bool) and abs(value) < MOST
    return None if right else "expected a whole number"


def count(value: Any) -> str | None:
    return None if whole(value) is None and value >= 0 else "expected a whole number from 0 on"


def positive(value: Any) -> str | None:
    return None if whole(value) is None and value > 0 else "expected a whole number from 1 on"


def number(value: Any) -> str | None:
    right = isinstance(value, float) or whole(value) is None
    return None if right else "expected a number"


def anything(value: Any) -> str | None:
    return None


def mapping(value: Any) -> str | None:
    return None if isinstance(value, Mapping) else "expected a mapping"


def rung(value: Any) -> str | None:
    right = isinstance(value, str) and (value in APART or re.fullmatch(r"[0-9]{1,6}", value))
    return None if right else f"expected a number as text, or one of {', '.join(APART)}"


def digest(value: Any) -> str | None:
    right = isinstance(value, str) and re.fullmatch(r"[0-9a-fA-F]{1,128}", value)
    return None if right else "expected hex digits"


def maybe(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def list_of(check: Check) -> Check:
    def checked(value: Any) -> str | None:
        if not isinstance(value, list):
            return "expected a list"
        return next((f"[{i}]: {e}" for i, v in enumerate(value) if (e := check(v))), None)

    return checked


def map_of(check: Check) -> Check:
    def checked(value: Any) -> str | None:
        if not isinstance(value, Mapping):
            return "expected a mapping"
        return next((f"{k}: {e}" for k, v in value.items() if (e := check(v))), None)

    return checked


def record(**fields: Check) -> Check:
    """A mapping with these fields; a name that ends in "_" may be missing."""

    def checked(value: Any) -> str | None:
        if not isinstance(value, Mapping):
            return "expected a mapping"
        for name, check in fields.items():
            key = name.rstrip("_")
            if key not in value:
                if name == key:
                    return f"{key}: missing"
            elif error := check(value[key]):
                return f"{key}: {error}"
        return None

    return checked


def point(value: Any) -> str | None:
    """A pair of tokens and loss; a loss that was not finite is null."""
    right = isinstance(value, list) and len(value) == 2 and number(value[0]) is None
    return None if right and maybe(number)(value[1]) is None else "expected tokens and a loss"


FLAG: Check = lambda value: None if isinstance(value, bool) else "expected true or false"  # noqa: E731
METRIC = record(name=text, unit_=text, lower_is_better_=FLAG, root_=FLAG, of_loss_=FLAG)
DATA = record(
    name_=text,
    digest_=maybe(digest),
    n_bytes_=count,
    n_held_out_=count,
    n_test_=count,
    repeated_=maybe(number),
    looked_at_=text,
    left_out_=list_of(text),
)
CONFIG = record(
    data_=maybe(text),
    test_fraction_=number,
    searcher_=text,
    rungs_=list_of(count),
    keep_=number,
    search_tokens_=maybe(count),
    final_tokens_=count,
    final_seeds_=count,
    slope_seeds_=count,
    n_finalists_=count,
    seq_len_=count,
    batch_size_=count,
    score_windows_=maybe(count),
    optimizer_=text,
)
FINALIST = record(candidate=text, mean=maybe(number), spread_=maybe(number), trials=list_of(text))
KINDS: dict[str, Check] = {
    "study": record(
        config=CONFIG,
        metric_=METRIC,
        data_=DATA,
        baselines_=map_of(number),
        versions_=map_of(text),
    ),
    "extended": record(config=CONFIG),
    "earlier": record(folder=text, group=text, spec=mapping, trials=list_of(record(id=text))),
    "proposed": record(specs=list_of(mapping)),
    "measured": record(id=text, refusal=maybe(record(rule=text, value_=anything, bound_=anything))),
    "screen": record(id=text, by=text, parent_=maybe(text), score=maybe(number), tokens_=count),
    "candidate": record(
        id=text,
        group=text,
        name=text,
        family=text,
        spec=mapping,
        proxy_=maybe(number),
        params=positive,
        estimated_params_=maybe(count),
        state_bytes=count,
        latency_ms_=maybe(number),
        parents_=maybe(list_of(text)),
        settings_=mapping,
        inherited_=maybe(number),
        proxies_=maybe(map_of(maybe(number))),
        proxy_failures_=map_of(text),
    ),
    "settings": record(
        family=text, candidate_=text, scores=map_of(maybe(number)), settings=mapping
    ),
    "trial": record(
        id=text,
        candidate=text,
        rung=rung,
        seed=whole,
        settings=mapping,
        tokens=count,
        score=maybe(number),
        seconds=number,
        tokens_per_second=maybe(number),
        curve=list_of(point),
        failure=maybe(text),
        values_=maybe(list_of(maybe(number))),
        inherited_=maybe(record(share=number)),
        non_finite_=map_of(text),
    ),
    "narrow": record(
        candidate=text,
        spec=maybe(mapping),
        params=maybe(count),
        trials=list_of(text),
        refusal=maybe(text),
    ),
    "saved": record(candidate=text, seed=whole, files=map_of(text)),
    "sample": record(candidate=text, seed=whole, prompt=text, text=text),
    "result": record(
        winner=text,
        best_=text,
        preset_=maybe(text),
        ranking=list_of(text),
        finalists_=list_of(FINALIST),
        tokens_=count,
        refused_=maybe(map_of(count)),
    ),
}


def check_events(events: Iterable[Event], place: object) -> list[Event]:
    """All of `checked`."""
    return list(checked(events, place))


def checked(events: Iterable[Event], place: object) -> Iterator[Event]:
    """The events one by one, if each is what its kind is made of and names what stands before it.

    Args:
        events: line by line.
        place: of the journal, for the message.

    Raises:
        StudyError: names the line, the field, what is expected there and what it holds.
    """
    known: dict[str, set[str]] = {"candidate": set(), "trial": set()}
    for line, event in enumerate(events, start=1):
        fault = _fault(event, known)
        if fault:
            raise StudyError(f"{place}, line {line}: {fault}; repair or delete that line")
        if event["event"] in known:
            known[event["event"]].add(event["id"])
        yield event


def _fault(event: Event, known: Mapping[str, set[str]]) -> str | None:
    kind = event.get("event")
    if not isinstance(kind, str):
        return f"event: expected the kind of an event, got {cut(kind)}"
    check = KINDS.get(kind)
    if check is None:
        return None
    if fault := check(event):
        field = fault.partition(":")[0]
        given = f", got {cut(event[field])}" if field in event else ""
        return f"{kind}.{fault}{given}"
    for what, field, names in _references(kind, event):
        if unknown := [name for name in names if name not in known[what]]:
            return f"{kind}.{field}: no {what} {cut(unknown[0])} stands before it"
    return None


def _references(kind: str, event: Event) -> Iterable[tuple[str, str, list[str]]]:
    if kind in ("trial", "narrow"):
        yield "candidate", "candidate", [event["candidate"]]
    if kind == "result":
        own = [event["winner"], event.get("best"), event.get("preset")]
        yield "candidate", "winner", [name for name in own if name is not None]
        for final in event.get("finalists") or ():
            yield "candidate", "finalists", [final["candidate"]]
            yield "trial", "finalists", final["trials"]
