"""The plots of a report: what of a summary is drawn, and what is said when there is nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from kizzasi.nas.report.layers import layer_rows
from kizzasi.nas.report.svg import (
    GROUPS,
    Line,
    Mark,
    Point,
    bars,
    plot,
    short,
    sketch,
    strips,
)
from kizzasi.nas.results.lineage import Node, ancestry, lineage
from kizzasi.nas.results.rank_agreement import spearman
from kizzasi.nas.results.summary import Event, Standing, Summary, proxies_of
from kizzasi.nas.results.words import said
from kizzasi.nas.searchers.nsga2 import pareto_front

# What a candidate costs: field, name, axis with its unit.
COSTS = (
    ("params", "parameters", "parameters"),
    ("state_bytes", "state size", "state after 1,024 tokens, bytes"),
    ("latency_ms", "latency", "measured latency, ms"),
)

LEAST_FOR_A_TREND = 8  # candidates
MOST_CHOICES = 8  # bars
NAMED_CURVES = 3
MOST_POINTS = 1_000  # of a drawn line, which has fewer pixels


@dataclass(frozen=True)
class Figure:
    """A title, SVG (or a sentence that says what is missing), and a caption."""

    title: str
    svg: str
    caption: str = ""
    drawn: bool = True

    @classmethod
    def missing(cls, title: str, what: str) -> Figure:
        return cls(title, f'<p class="missing">{escape(what)}</p>', drawn=False)


@dataclass(frozen=True)
class Figures:
    """Every plot of the report, by what it is about."""

    training: tuple[Figure, ...]
    fronts: tuple[Figure, ...]
    proxies: tuple[Figure, ...]


def figures(summary: Summary) -> Figures:
    """Draw all that the report shows."""
    measured = [c for c in COSTS if any(c[0] in s.entry for s in summary.standings)] or COSTS[:2]
    named = list(summary.agreements)
    return Figures(
        training=(
            _scores(summary),
            _layers(summary),
            _best_so_far(summary),
            _learning_curves(summary),
            _seeds(summary),
            _mattered(summary),
        ),
        fronts=(*(_pareto(summary, *cost) for cost in measured), _family(summary)),
        proxies=tuple(_proxy_against_training(summary, name) for name in named) or (_no_proxy(),),
    )


def _scores(summary: Summary) -> Figure:
    title = "Held-out score against baselines"
    baselines: dict[str, float] = summary.study.get("baselines", {})
    rows: list[tuple[str, str, float, float | None]] = [
        (name, "baseline", value, None) for name, value in baselines.items()
    ]
    for final, group in ((summary.winner, "winner"), (summary.preset, "preset")):
        if final and final.mean is not None:
            name = final.entry["name"]
            rows.append((name, group, summary.metric.sign * final.mean, final.spread))
    if not rows:
        return Figure.missing(title, "Neither baselines nor final scores are there yet.")
    rows.sort(key=lambda row: row[2])
    better = "Less" if summary.metric.lower_is_better else "More"
    caption = f"{better} is better. Whiskers: one standard deviation over the seeds."
    if not summary.winner:
        caption = f"{better} is better. The winner's final training is still to come."
    return Figure(title, bars(title, summary.unit, rows), caption)


def _layers(summary: Summary) -> Figure:
    entry = summary.leader
    title = "The winner's layers" if summary.winner else "Layers of the leader so far"
    if entry is None:
        return Figure.missing(title, "No searched candidate has a score yet.")
    caption = f"{entry['name']}: {entry['params']:,} parameters."
    return Figure(title, sketch(f"{title}: {entry['name']}", layer_rows(entry["spec"])), caption)


def _seeds(summary: Summary) -> Figure:
    title = "Finalists, seed by seed"
    rows = [
        (f.entry["name"], _group(summary, f.entry), [summary.metric.sign * s for s in f.scores])
        for f in summary.finals
    ]
    rows = [row for row in rows if row[2]]
    if not rows:
        return Figure.missing(title, "No finalist has a score yet.")
    noise = summary.noise
    said = (
        f"The noise floor is {noise}, with {noise.freedom} degrees of freedom."
        if noise
        else "It takes two finalists with two seeds in common to state a noise floor."
    )
    drawn = strips(title, _held_out(summary), rows, noise.floor if noise else None)
    caption = f"A mark per seed, a tick at the mean, a whisker of one standard deviation. {said}"
    return Figure(title, drawn, caption)


def progress(summary: Summary) -> list[Point]:
    """(tokens spent on all trainings together, the best score so far) where it falls, and at the
    end. A rung's training goes on from the one before it, whose tokens count once.
    """
    known: dict[str, int] = {}
    spent, best = 0, math.inf
    points: list[Point] = []
    for trial in summary.trials:
        training = trial["id"].rpartition("-")[0]
        spent += max(0, trial["tokens"] - known.get(training, 0))
        known[training] = max(trial["tokens"], known.get(training, 0))
        score = trial["score"]
        if score is not None and score < best and spent:
            points += [(spent, best), (spent, score)] if points else [(spent, score)]
            best = score
    return [*points, (max(spent, points[-1][0] + 1), best)] if points else []


def _best_so_far(summary: Summary) -> Figure:
    title = "Best so far"
    points = progress(summary)
    if not points:
        return Figure.missing(title, "No trial has a score yet.")
    best = f"best score so far: {summary.show(points[-1][1])} {summary.unit}"
    x_label = "tokens, all trainings together"
    drawn = plot(title, x_label, _held_out(summary), lines=[Line(points, "searched", best)])
    return Figure(title, drawn, "The best held-out score of any candidate on any rung.")


def _learning_curves(summary: Summary) -> Figure:
    title = "Learning curves"
    lines = list(_lines(summary))
    if not lines:
        return Figure.missing(title, "No training has got as far as its first loss yet.")
    drawn = plot(title, "tokens trained on", "training loss", lines=lines)
    caption = (
        "One line per candidate, its longest training; the best are named. Means between two "
        "looks at the loss, cut at twice the first. A cross: training failed."
    )
    return Figure(title, drawn, caption)


def _mattered(summary: Summary) -> Figure:
    """How closely each choice goes with the score, over all candidates of the first rung."""
    title = "What went with a good score"
    scored = [
        (choices_of(s.entry["spec"]), score)
        for s in summary.standings
        if s.entry["group"] != "preset" and (score := s.score("0")) is not None
    ]
    if len(scored) < LEAST_FOR_A_TREND:
        return Figure.missing(title, f"It takes {LEAST_FOR_A_TREND} candidates on one budget.")
    names = dict.fromkeys(name for choices, _ in scored for name in choices)
    rows: list[tuple[str, str, float, float | None]] = []
    for name in names:
        rho = spearman([c.get(name, 0.0) for c, _ in scored], [-score for _, score in scored])
        if rho is not None:
            more = "more" if rho > 0 else "fewer"
            rows.append((f"{more} {name}", "searched", abs(rho), None))
    if not rows:
        return Figure.missing(title, "All candidates made the same choices.")
    rows.sort(key=lambda row: -row[2])
    caption = (
        f"Spearman's rank correlation with the first rung's score, over {len(scored)} searched "
        "candidates. Choices that go together are not told apart."
    )
    return Figure(title, bars(title, "rank correlation", rows[:MOST_CHOICES]), caption)


def choices_of(spec: Mapping[str, Any]) -> dict[str, float]:
    """What an architecture chose, as numbers: depth, width, layers of each kind."""
    found: dict[str, float] = {"layers": len(spec["blocks"]), "channels (d_model)": spec["d_model"]}
    for block in spec["blocks"]:
        parts = [block] if "kind" in block else [block["mixer"], block["channel"]]
        for part in parts:
            if part is not None:
                name = f"{part['kind']} layers"
                found[name] = found.get(name, 0.0) + 1
    return found


def trainings(summary: Summary) -> list[tuple[Event, Event]]:
    """Candidate and deepest trial of each training: a rung continues the one before it."""
    finals = [(f.entry, t) for f in summary.finals for t in f.trials]
    counted = [(s.entry, t) for s in summary.standings for t in s.trials]
    longest: dict[str, tuple[Event, Event]] = {}
    for entry, trial in finals + counted:
        training = trial["id"].rpartition("-")[0]
        if training not in longest or trial["tokens"] >= longest[training][1]["tokens"]:
            longest[training] = entry, trial
    return list(longest.values())


def _lines(summary: Summary) -> Iterator[Line]:
    longest: dict[str, tuple[Event, Event]] = {}
    for entry, trial in trainings(summary):
        kept = longest.get(entry["id"])
        if kept is None or trial["tokens"] > kept[1]["tokens"]:
            longest[entry["id"]] = entry, trial
    best = {s.entry["id"] for s in summary.standings[:NAMED_CURVES]}
    for entry, trial in longest.values():
        known = [(t, loss) for t, loss in trial["curve"] if loss is not None]
        shown = [*known[: -1 : -(-len(known) // MOST_POINTS)], *known[-1:]] if known else []
        points = [(t, min(loss, 2 * abs(known[0][1]))) for t, loss in shown]
        if points:
            failed = trial["score"] is None
            text = f"{entry['name']}, {said(trial['settings'])}, seed {trial['seed']}"
            name = entry["name"] if entry["id"] in best else ""
            yield Line(points, _group(summary, entry), text, failed, name)


def _no_proxy() -> Figure:
    missing = "No candidate with a proxy score has been trained yet."
    return Figure.missing("Proxy against training", missing)


def _proxy_against_training(summary: Summary, name: str) -> Figure:
    title = "Proxy against training" if name == "proxy" else f"Proxy {name} against training"
    marks = [
        Mark(value, score, _group(summary, s.entry), _label(summary, s.entry, score))
        for s in summary.standings
        if s.entry["group"] != "preset"
        and (value := proxies_of(s.entry).get(name)) is not None
        and (score := s.score("0")) is not None
    ]
    if not marks:
        return Figure.missing(title, "No candidate with this proxy has a score.")
    agreement = summary.agreements[name]
    caption = (
        "First rung, one budget for all. A good proxy makes the points fall to the right. "
        f"Kendall tau-b {agreement.everywhere.proxy.kendall_tau_b}, inside the band "
        f"{agreement.in_band.proxy.kendall_tau_b}."
    )
    drawn = plot(title, f"{name} score, higher promises more", _held_out(summary), marks)
    return Figure(title, drawn, caption)


def _pareto(summary: Summary, key: str, name: str, label: str) -> Figure:
    """Marks of every rung, one front per rung: scores of different budgets do not compete."""
    title = f"{summary.unit[:1].upper()}{summary.unit[1:]} against {name}"
    marks: list[Mark] = []
    fronts: list[list[Point]] = []
    rungs = summary.rungs
    measured = [s for s in summary.standings if s.entry.get(key) is not None]
    for rung in rungs:
        early = rung is not rungs[-1] and len(rungs) > 1
        reached = [
            Mark(
                s.entry[key],
                score,
                _group(summary, s.entry),
                _label(summary, s.entry, score),
                early,
            )
            for s in measured
            if (score := s.score(rung.name)) is not None
        ]
        marks += reached
        points = [(mark.x, mark.y) for mark in reached]
        fronts.append(sorted({points[i] for i in pareto_front(points)}) if points else [])
    if not marks:
        return Figure.missing(title, "No candidate has a score yet.")
    links = [points for s in measured if len(points := _climb(s, key)) > 1]
    budgets = ", ".join(f"{short(rung.tokens)} tokens" for rung in rungs)
    caption = f"Lower left is better. Dashed: the Pareto front of each rung ({budgets})."
    if len(rungs) > 1:
        caption += " Hollow marks: earlier rungs, linked to what the candidate reached later."
    return Figure(title, plot(title, label, _held_out(summary), marks, (), fronts, links), caption)


def _climb(standing: Standing, key: str) -> Sequence[Point]:
    x = standing.entry[key]
    return [(x, s) for t in standing.trials if (s := t["score"]) is not None]


def _family(summary: Summary) -> Figure:
    """The family tree over its scores: a step down is a child better than its parent."""
    title = "Lineage"
    nodes = lineage(summary)
    if not any(node.parents for node in nodes.values()):
        return Figure.missing(title, "No candidate descends from another.")
    place = {
        node.id: (float(node.generation), node.score)
        for node in nodes.values()
        if node.score is not None
    }
    if not place:
        return Figure.missing(title, "No candidate has a score yet.")
    leader = summary.leader
    line = ancestry(nodes, [leader["id"]] if leader else [])
    links = [edge for node in nodes.values() for edge in _edges(node, place)]
    led = [Line(edge, "winner") for node in line.values() for edge in _edges(node, place)]
    marks = [
        Mark(
            *place[own],
            "winner" if node.winner else _style(node.group),
            _born(summary, node, nodes),
        )
        for own, node in nodes.items()
        if own in place
    ]
    drawn = plot(
        title, "generation", f"{_held_out(summary)}, first rung", marks, led, (), links, True
    )
    caption = (
        "Lines lead from parent to child, on the first rung's budget. In the winner's colour: "
        f"{'the winner' if summary.winner else 'the leader so far'} and its ancestors."
    )
    return Figure(title, drawn, caption)


def _edges(node: Node, place: dict[str, Point]) -> list[list[Point]]:
    return [[place[p], place[node.id]] for p in node.parents if p in place and node.id in place]


def _born(summary: Summary, node: Node, nodes: dict[str, Node]) -> str:
    assert node.score is not None, "only scored nodes are drawn"
    text = f"{node.name}: {summary.show(node.score)} {summary.unit}"
    if node.parents:
        text += f"; from {' and '.join(nodes[parent].name for parent in node.parents)}"
    return text if node.inherited is None else f"{text}; inherits {node.inherited:.0%}"


def _group(summary: Summary, entry: Event) -> str:
    winner = summary.winner
    return "winner" if winner and entry["id"] == winner.entry["id"] else _style(entry["group"])


def _style(group: str) -> str:
    """A group without a look of its own is one of the searched."""
    return group if group in GROUPS else "searched"


def _label(summary: Summary, entry: Event, score: float) -> str:
    shown = f"{summary.show(score)} {summary.unit}"
    return f"{entry['name']}: {shown}, {entry['params']:,} parameters"


def _held_out(summary: Summary) -> str:
    """The axis of scores; of a metric that rises, the other way round, so that lower is better."""
    return f"held-out {summary.unit}" + ("" if summary.metric.lower_is_better else ", negated")
