"""A table as Markdown, and as a picture."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from kizzasi.nas.report.svg import strips
from kizzasi.train import Metric
from reproductions.table import Problem, Table

Cells = dict[str, list[float | None]]  # by column, a score of every seed
INK = "svg { background: #fff; --soft: #666; --rule: #ddd; --ink: #222; --searched: #2563a8; }"
STYLE = """
text { font: 13px system-ui, sans-serif; fill: var(--soft); } .name, .value { fill: var(--ink); }
.grid { stroke: var(--rule); } .axis { stroke: var(--soft); }
.mark { stroke: var(--searched); stroke-width: 1.6; }
.mean, .whisker { stroke: var(--ink); stroke-width: 1.5; }
"""


def cells(table: Table, problem: Problem, row: dict[str, Any]) -> Cells:
    """What stands in a row, by column."""
    if table.by_rate:
        return {f"rate {rate}": scores for rate, scores in row["by_rate"].items()}
    columns = zip(*row["scores"], strict=True)
    found = {name: list(c) for name, c in zip(problem.columns, columns, strict=True)}
    return found if has_chance(problem) else {"valid": row["valid"], **found}


def has_chance(problem: Problem) -> bool:
    """Whether an even guess is all that a model is compared with."""
    return list(problem.task.baselines()) == ["chance"]


def printed(table: Table, problem: Problem, rows: list[dict[str, Any]]) -> str:
    """The Markdown table."""
    metric = problem.task.metric
    names = list(dict.fromkeys(n for row in rows for n in cells(table, problem, row)))
    head = f"{table.source}. Here: {table.setting()}. {_scale(problem)}"
    if table.published:
        head += f" Published: {published(table).setting()}."
    if table.by_rate:
        head += " A column is a rate, with scores on valid."
    lines = [
        f"{head} Medians over {len(rows[0]['scores'])} seeds (lowest to highest), "
        f"{'right answers in %' if metric.name == 'accuracy' else metric.name}.",
        "",
        "| model | parameters | " + " | ".join(names) + " | lr | published |",
        "| --- | ---: | " + "---: | " * len(names) + "---: | --- |",
    ]
    for row in rows:
        known = cells(table, problem, row)
        shown = [said(metric, known[n]) if n in known else "not tried" for n in names]
        figures = " | ".join(shown)
        line = f"| {row['name']} | {row['params']:,} | {figures} | {row['rate']:g} |"
        lines.append(f"{line} {row['published']} |")
    return "\n".join(lines)


def published(table: Table) -> Table:
    """The table in its published setting."""
    return replace(table, **table.published)


def _scale(problem: Problem) -> str:
    metric = problem.task.metric
    told = [f"{k} {said(metric, [v])}" for k, v in problem.task.baselines().items()]
    return f"On valid: {', '.join(told)}."


def said(metric: Metric, scores: list[float | None]) -> str:
    """Median and range, or how often it diverged."""
    known = [s for s in scores if s is not None]
    if len(known) < len(scores):
        return f"diverged {len(scores) - len(known)} of {len(scores)} times"
    scale, digits = (100, 1) if metric.name == "accuracy" else (1, 3)
    low, mid, high = (scale * s for s in (min(known), statistics.median(known), max(known)))
    spread = f" ({low:.{digits}f} to {high:.{digits}f})" if len(known) > 1 else ""
    return f"{mid:.{digits}f}{spread}"


def picture(name: str, table: Table, problem: Problem, rows: list[dict[str, Any]]) -> str:
    """A standalone SVG: a mark for every seed, in every row and column."""
    scale = 100 if problem.task.metric.name == "accuracy" else 1
    lines = []
    for row in rows:
        for column, scores in cells(table, problem, row).items():
            known = [scale * s for s in scores if s is not None]
            if known:
                short = column.replace("trained length", "trained")
                lines.append((f"{row['name']}: {short}", "searched", known))
    unit = "right answers, %" if scale == 100 else problem.task.metric.label
    drawn = strips(name, unit, lines, None)
    style = f"<style>{INK}{STYLE}</style>"
    space = '<svg xmlns="http://www.w3.org/2000/svg" '
    return drawn.replace("<svg ", space, 1).replace("<title>", f"{style}<title>", 1)
