"""The plots of a report: what of a summary is drawn, and what is said when there is nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

from kizzasi.nas.summary import Event, Final, Standing, Summary
from kizzasi.nas.svg import Line, Mark, Point, bars, pareto_front, plot, short, sketch

UNIFORM = 8.0  # bits/byte of a model that knows nothing
DETAILS = (
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "window",
    "d_state",
    "expand",
    "hidden",
    "n_experts",
    "top_k",
)


@dataclass(frozen=True)
class Figure:
    """A title, SVG (or a sentence that says what is missing), and a caption."""

    title: str
    svg: str
    caption: str = ""

    @classmethod
    def missing(cls, title: str, what: str) -> Figure:
        return cls(title, f'<p class="missing">{escape(what)}</p>')


def figures(summary: Summary) -> list[Figure]:
    """Every plot of the report, in reading order."""
    return [
        _scores(summary),
        _layers(summary),
        _learning_curves(summary),
        _proxy_against_training(summary),
        _pareto(summary, "params", "parameters", "parameters"),
        _pareto(summary, "state_bytes", "state size", "state after 1,024 tokens, bytes"),
    ]


def _scores(summary: Summary) -> Figure:
    title = "Held-out score against baselines"
    baselines: dict[str, float] = summary.study.get("baselines", {})
    rows: list[tuple[str, str, float, float | None]] = [
        (name, "baseline", value, None) for name, value in baselines.items()
    ]
    for final, group in ((summary.winner, "winner"), (summary.preset, "preset")):
        if final and final.mean is not None:
            name = final.entry["name"]
            rows.append((name, group, final.mean, final.spread))
    if not rows:
        return Figure.missing(title, "Neither baselines nor final scores are there yet.")
    rows.sort(key=lambda row: row[2])
    caption = "Less is better. Whiskers: one standard deviation over the seeds."
    if not summary.winner:
        caption = "Less is better. The winner's final training is still to come."
    return Figure(title, bars(title, "bits/byte", rows), caption)


def _layers(summary: Summary) -> Figure:
    entry = summary.leader
    title = "The winner's layers" if summary.winner else "Layers of the leader so far"
    if entry is None:
        return Figure.missing(title, "No searched candidate has a score yet.")
    spec = entry["spec"]
    stem = {k: v for k, v in spec["stem"].items() if k != "kind"}
    rows = [["input", f"{spec['stem']['kind']}: {_pairs(stem)}, d_model {spec['d_model']}"]]
    first = 1
    for block, equal in groupby(spec["blocks"]):
        last = first + len(list(equal)) - 1
        label = f"layer {first}" if first == last else f"layers {first}-{last}"
        parts = [p for p in (block["mixer"], block["channel"]) if p is not None]
        rows.append([label, *map(_box, parts)])
        first = last + 1
    head = "head: tied to the embedding" if spec["tie_head"] else "head: linear"
    rows.append(["output", f"{spec['norm']} norm", head])
    caption = f"{entry['name']}: {entry['params']:,} parameters."
    return Figure(title, sketch(f"{title}: {entry['name']}", rows), caption)


def _box(part: dict[str, Any]) -> str:
    details = {k: part[k] for k in DETAILS if part.get(k) is not None}
    return f"{part['kind']}: {_pairs(details)}" if details else part["kind"]


def _pairs(values: dict[str, Any]) -> str:
    numbers = {k: f"{v:g}" if isinstance(v, float) else v for k, v in values.items()}
    return ", ".join(f"{k} {v}" for k, v in numbers.items())


def _learning_curves(summary: Summary) -> Figure:
    title = "Learning curves"
    lines = list(_lines(summary))
    if not lines:
        return Figure.missing(title, "No training has got as far as its first loss yet.")
    drawn = plot(title, "tokens trained on", "training loss, bits/byte", lines=lines)
    caption = "Means between two looks at the loss, cut at 8 bits/byte. A cross: training failed."
    return Figure(title, drawn, caption)


def _lines(summary: Summary) -> Iterator[Line]:
    """One line per training: a rung continues the curve of the rung before it."""
    finals = [(f.entry, t) for f in (summary.winner, summary.preset) if f for t in f.trials]
    counted = [(s.entry, t) for s in summary.standings for t in s.trials]
    longest: dict[str, tuple[Event, Event]] = {}
    for entry, trial in counted + finals:
        training = trial["id"].rpartition("-")[0]
        if training not in longest or trial["tokens"] >= longest[training][1]["tokens"]:
            longest[training] = entry, trial
    for entry, trial in longest.values():
        points = [(t, min(bits, UNIFORM)) for t, bits in trial["curve"] if bits is not None]
        if points:
            failed = trial["bits_per_byte"] is None
            text = f"{entry['name']}, lr {trial['lr']:g}, seed {trial['seed']}"
            yield Line(points, _group(summary, entry), text, failed)


def _proxy_against_training(summary: Summary) -> Figure:
    title = "Proxy against training"
    marks = [
        Mark(s.entry["proxy"], score, _group(summary, s.entry), _label(s.entry, score))
        for s in summary.standings
        if s.entry["proxy"] is not None and (score := s.score("0")) is not None
    ]
    if not marks or summary.worth is None:
        return Figure.missing(title, "No candidate with a proxy score has been trained yet.")
    tau = summary.worth.everywhere.proxy.kendall_tau_b
    caption = (
        "First rung, one budget for all. A good proxy makes the points fall to the right. "
        f"Kendall tau-b {tau}."
    )
    drawn = plot(title, "proxy score, higher promises more", "held-out bits/byte", marks)
    return Figure(title, drawn, caption)


def _pareto(summary: Summary, key: str, name: str, label: str) -> Figure:
    """Marks of every rung, one front per rung: scores of different budgets do not compete."""
    title = f"Bits/byte against {name}"
    marks: list[Mark] = []
    fronts: list[list[Point]] = []
    rungs = summary.rungs
    for rung in rungs:
        early = rung is not rungs[-1] and len(rungs) > 1
        reached = [
            Mark(s.entry[key], score, _group(summary, s.entry), _label(s.entry, score), early)
            for s in summary.standings
            if (score := s.score(rung.name)) is not None
        ]
        marks += reached
        fronts.append(pareto_front((mark.x, mark.y) for mark in reached))
    if not marks:
        return Figure.missing(title, "No candidate has a score yet.")
    links = [points for s in summary.standings if len(points := _climb(s, key)) > 1]
    budgets = ", ".join(f"{short(rung.tokens)} tokens" for rung in rungs)
    caption = f"Lower left is better. Dashed: the Pareto front of each rung ({budgets})."
    if len(rungs) > 1:
        caption += " Hollow marks: earlier rungs, linked to what the candidate reached later."
    return Figure(
        title, plot(title, label, "held-out bits/byte", marks, (), fronts, links), caption
    )


def _climb(standing: Standing, key: str) -> Sequence[Point]:
    x = standing.entry[key]
    return [(x, s) for t in standing.trials if (s := t["bits_per_byte"]) is not None]


def _group(summary: Summary, entry: Event) -> str:
    winner: Final | None = summary.winner
    return "winner" if winner and entry["id"] == winner.entry["id"] else entry["group"]


def _label(entry: Event, score: float) -> str:
    return f"{entry['name']}: {score:.3f} bits/byte, {entry['params']:,} parameters"
