"""What a search found, for people: a table for the terminal, report.md, and report.html.

The page is one file without scripts or links to anything; its policy forbids the browser to load
anything, and every text from outside is escaped.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from html import escape
from pathlib import Path

from kizzasi.errors import StudyError
from kizzasi.files import write_text
from kizzasi.nas.report.figures import Figure, figures
from kizzasi.nas.report.sentences import findings
from kizzasi.nas.report.svg import STYLE, short
from kizzasi.nas.report.tables import (
    LEFT_ALIGNED,
    Part,
    Rows,
    cells,
    column_names,
    finalist_tables,
    tables,
)
from kizzasi.nas.results.lineage import ancestry, lineage, mermaid, to_json
from kizzasi.nas.results.summary import Event, Summary, summarise
from kizzasi.nas.results.words import gist

__all__ = ["Summary", "findings", "html", "markdown", "summarise", "table", "write_report"]

COLUMNS = 100


def table(summary: Summary) -> str:
    """The table of candidates and the findings, as plain text in 100 columns."""
    said = "\n".join(textwrap.fill(text, COLUMNS) for text in findings(summary))
    if not summary.standings:
        return said
    names = column_names(summary)
    rows = [names, *(cells(summary, s) for s in summary.standings)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
    spare = COLUMNS - sum(widths) - 2 * (len(widths) - 1)
    widths[1] = max(len("architecture"), widths[1] + min(0, spare))
    lines = ["  ".join(_aligned(row, names, widths)).rstrip() for row in rows]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([lines[0], rule, *lines[1:], "", said])


def markdown(summary: Summary) -> str:
    """The report without its plots, as Markdown; the family tree is a Mermaid diagram and JSON."""
    said = "\n".join(f"- {md(text)}" for text in findings(summary))
    text = f"# {md(_headline(summary))}\n\n{said}"
    for part in tables(summary):
        text += f"\n\n## {part.title}\n\n{md_table(part)}"
        if part.title == "Layers" and summary.leader:
            text += f"\n\n{md(summary.leader['name'])}, {summary.leader['params']:,} parameters"
    return f"{text}\n\n## Lineage\n\n{md_lineage(summary)}\n\nThe plots are in report.html.\n"


def md_lineage(summary: Summary) -> str:
    """The winner and its ancestors, or a sentence if it has none."""
    nodes = lineage(summary)
    leader = summary.leader
    family = ancestry(nodes, [leader["id"]]) if leader else {}
    if not any(node.parents for node in nodes.values()):
        return "No candidate descends from another."
    if len(family) < 2:
        return "The leader has no ancestors: it was sampled anew."
    line = list(family.values())
    return f"```mermaid\n{mermaid(line, summary.metric)}\n```\n\n{md_json(to_json(line))}"


def md_json(text: str) -> str:
    """JSON as a fenced block, harmless also where a viewer takes HTML for what it says."""
    return "```json\n" + text.replace("<", "\\u003c") + "\n```"


def html(summary: Summary) -> str:
    """The whole report as one HTML page."""
    said = "".join(f"<li>{escape(text)}</li>" for text in findings(summary))
    candidates, *others = [part for part in tables(summary) if not part.plotted]
    by_title = {part.title: part for part in others}
    drawn = figures(summary)
    plots = {
        name: f'<div class="pair">{"".join(map(_html_figure, getattr(drawn, name)))}</div>'
        for name in ("training", "fronts", "proxies")
    }
    fronts, rungs, worth = (
        _html_table(by_title.pop(title))
        for title in ("Pareto fronts", "Rungs", "What the proxy was worth")
    )
    finals = finalist_tables(summary)
    finalists = "".join(_html_table(by_title.pop(part.title)) for part in finals)
    small = [part for part in by_title.values() if part.small]
    large = [part for part in by_title.values() if not part.small]
    title = escape(_headline(summary))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>'
        f'{title}</title><meta name="viewport" content="width=device-width">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">"
        f"<style>{PAGE_STYLE}{STYLE}</style></head><body><main>"
        f'<header><h1>{title}</h1><div class="cards">{_cards(summary)}</div></header>'
        f"<section><h2>Findings</h2><ul>{said}</ul></section>"
        f"{plots['training']}{finalists}{rungs}"
        f"{plots['fronts']}{fronts}{plots['proxies']}{worth}{_html_table(candidates)}"
        f'<div class="pair">{"".join(map(_html_table, small))}</div>'
        f"{''.join(map(_html_table, large))}</main></body></html>\n"
    )


def write_report(folder: Path, events: Iterable[Event]) -> Summary:
    """Write report.md and report.html, each in one move; returns what they say.

    Raises:
        StudyError: the folder cannot be written; names the file and the way out.
    """
    summary = summarise(events)
    for name, text in (("report.md", markdown(summary)), ("report.html", html(summary))):
        path = folder / name
        try:
            write_text(path, text)
        except OSError as error:
            raise StudyError(
                f"{path}: cannot write the report: {error.strerror}; make room or make the "
                "folder writable, then --resume; the journal is intact"
            ) from error
    return summary


def _headline(summary: Summary) -> str:
    name = summary.data.get("name")
    return f"Architecture search on {name}" if name else "Architecture search"


def _aligned(row: list[str], names: list[str], widths: list[int]) -> list[str]:
    cells = []
    for name, cell, width in zip(names, row, widths, strict=True):
        cell = cell if len(cell) <= width else cell[: width - 1] + "…"
        cells.append(cell.ljust(width) if name in LEFT_ALIGNED else cell.rjust(width))
    return cells


def md(text: str) -> str:
    """Text as itself: no character of it means anything to Markdown, HTML or a terminal."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    return re.sub(r"([\\`*_\[\]#|~])", r"\\\1", escape(line, quote=False))


def md_table(part: Part) -> str:
    """The table and its note, or what is said in its place."""
    if len(part.rows) < 2:
        return part.missing
    return md_rows(part.rows) + (f"\n\n{md(part.note)}" if part.note else "")


def md_rows(rows: Rows) -> str:
    """A Markdown table; a cell of several lines, a traceback, is told in one."""
    rule = [":--" if name in LEFT_ALIGNED else "--:" for name in rows[0]]
    lines = [[md(gist(cell)) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))


def _html_table(part: Part) -> str:
    title = f"<h2>{escape(part.title)}</h2>"
    if len(part.rows) < 2:
        return f'<section>{title}<p class="missing">{escape(part.missing)}</p></section>'
    names, *rows = part.rows
    note = f'<p class="note">{escape(part.note)}</p>' if part.note else ""
    style = ["" if name in LEFT_ALIGNED else ' class="number"' for name in names]
    head = "".join(
        f'<th scope="col"{s}>{escape(name)}</th>' for s, name in zip(style, names, strict=True)
    )
    body = ""
    for i, row in enumerate(rows):
        cells = (f"<td{s}>{_cell(cell)}</td>" for s, cell in zip(style, row, strict=True))
        mark = ' class="won"' if i == part.marked else ""
        body += f"<tr{mark}>{''.join(cells)}</tr>"
    return (
        f'<section>{title}<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{note}</section>"
    )


def _cell(text: str) -> str:
    """Tracebacks show what they come to and open on a click."""
    if len(text.splitlines()) < 2:
        return escape(text)
    return f"<details><summary>{escape(gist(text))}</summary><pre>{escape(text)}</pre></details>"


def _html_figure(figure: Figure) -> str:
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>" if figure.caption else ""
    return f"<figure><h2>{escape(figure.title)}</h2>{figure.svg}{caption}</figure>"


def _cards(summary: Summary) -> str:
    winner, preset, leader = summary.winner, summary.preset, summary.leader
    cards = []
    if winner:
        cards.append((summary.numbers(winner), f"{summary.unit} of the winner"))
    if preset:
        cards.append((summary.numbers(preset), f"{summary.unit} of the best preset"))
    if leader:
        cards.append((f"{leader['params']:,}", "parameters"))
        cards.append((f"{short(leader['state_bytes'])}B", "state at 1,024 tokens"))
    cards.append((str(len(summary.trials)), "trials" if summary.finished else "trials so far"))
    return "".join(f"<p><b>{escape(value)}</b>{escape(text)}</p>" for value, text in cards)


PAGE_STYLE = """
:root { color-scheme: light dark; --ink: #16191d; --soft: #5c6670; --rule: #e1e5ea; --paper: #fff;
  --ground: #f4f6f8; --winner: #c7254e; --proxy: #2766d9; --random: #c77700; --preset: #2b8a5f;
  --outside: #8a4fbf; --searched: #2766d9; --baseline: #98a2ad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebee; --soft: #9aa5b1; --rule: #2c333b;
  --paper: #181c21; --ground: #101317; --winner: #ff6b8b; --proxy: #6ea4ff; --random: #f0a740;
  --preset: #54c795; --outside: #c08cf0; --searched: #6ea4ff; --baseline: #5f6b77; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 27px; line-height: 1.25; letter-spacing: -.015em; margin: 0 0 18px;
  overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 12px; letter-spacing: -.005em; }
section, figure { background: var(--paper); border: 1px solid var(--rule); border-radius: 12px;
  padding: 20px 22px; margin: 0 0 18px; min-width: 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(460px, 100%), 1fr));
  gap: 0 18px; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin-bottom: 18px; }
.cards p { margin: 0; padding: 12px 18px; background: var(--paper); color: var(--soft);
  border: 1px solid var(--rule); border-radius: 12px; font-size: 13px; }
.cards b { display: block; color: var(--ink); font-size: 21px; font-weight: 620;
  font-variant-numeric: tabular-nums; }
ul { margin: 0; padding-left: 20px; } li { margin: 0 0 6px; max-width: 90ch; }
figcaption, .missing, .note { color: var(--soft); font-size: 13px; margin: 10px 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
th { color: var(--soft); font-weight: 550; white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; }
td { overflow-wrap: break-word; }
.won td { color: var(--winner); font-weight: 600; }
pre { overflow-x: auto; font-size: 12px; } summary { cursor: pointer; }
"""
