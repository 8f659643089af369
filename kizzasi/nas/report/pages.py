"""What a search found, for people: a table for the terminal, report.md, and report.html."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterable
from html import escape
from pathlib import Path

from kizzasi.errors import StudyError
from kizzasi.files import write_text
from kizzasi.nas.report.page import headline, html
from kizzasi.nas.report.sentences import conclusions, verdict
from kizzasi.nas.report.tables import LEFT_ALIGNED, Part, Rows, cells, column_names, tables
from kizzasi.nas.results.lineage import ancestry, lineage, mermaid, to_json
from kizzasi.nas.results.summary import Event, Summary, summarise
from kizzasi.nas.results.words import gist, printable

__all__ = ["Summary", "conclusions", "html", "markdown", "summarise", "table", "write_report"]

COLUMNS = 100
MOST_ROWS = 12  # of candidates, at the end of a search
MOST_LINES = 12  # of a sample


def table(summary: Summary) -> str:
    """The table of candidates and the conclusions, as plain text in 100 columns."""
    said = "\n".join(textwrap.fill(text, COLUMNS) for text in conclusions(summary))
    if not summary.standings:
        return said
    return f"{_candidates(summary)}\n\n{said}"


def ending(summary: Summary, folder: Path) -> str:
    """What a person reads when a search is over: the best candidates, the verdict, a text by the
    model that was saved, and what to type next."""
    run = shlex.quote(str(folder))
    rows = _candidates(summary).split("\n")
    more = len(rows) - 2 - MOST_ROWS
    if more > 0:
        rows = [*rows[: 2 + MOST_ROWS], f"... and {more} more in the report"]
    parts = ["\n".join(rows), textwrap.fill(verdict(summary), COLUMNS)]
    if summary.sample:
        lines = printable(summary.sample["text"]).strip().split("\n")[:MOST_LINES]
        parts.append("it writes:\n" + "\n".join(f"  {line[: COLUMNS - 2]}" for line in lines))
    text = [f"kizzasi generate {run}", "what it writes"] if summary.sample else []
    commands = [
        *([text] if text else []),
        [f"kizzasi export {run} --out model", "weights, card and a script, to give away"],
        [f"kizzasi report {run}", f"every finding; pictures are in {folder / 'report.html'}"],
    ]
    width = max(len(command) for command, _ in commands)
    listed = "\n".join(f"  {command.ljust(width)}  # {why}" for command, why in commands)
    return "\n\n".join([*parts, f"next:\n{listed}"])


def _candidates(summary: Summary) -> str:
    """Everyone who took part, in 100 columns."""
    names = column_names(summary)
    rows = [names, *(cells(summary, s) for s in summary.standings)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
    spare = COLUMNS - sum(widths) - 2 * (len(widths) - 1)
    widths[1] = max(len("architecture"), widths[1] + min(0, spare))
    lines = ["  ".join(_aligned(row, names, widths)).rstrip() for row in rows]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([lines[0], rule, *lines[1:]])


def markdown(summary: Summary) -> str:
    """The report without its plots, as Markdown; the family tree is a Mermaid diagram and JSON."""
    said = "\n".join(f"- {md(text)}" for text in conclusions(summary))
    text = f"# {md(headline(summary))}\n\n{said}"
    if summary.sample:
        lines = printable(summary.sample["text"]).split("\n")
        text += "\n\n## Sample\n\n" + "\n".join(f"> {md(line)}  " for line in lines)
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
