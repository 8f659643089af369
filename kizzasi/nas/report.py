"""What a search found, for people: a table for the terminal, report.md, and report.html.

The page is one file without scripts or links to anything; its policy forbids the browser to load
anything, and every text from outside is escaped.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from kizzasi.errors import StudyError
from kizzasi.nas.figures import Figure, figures
from kizzasi.nas.summary import Event, Standing, Summary, findings, summarise
from kizzasi.nas.svg import STYLE, short
from kizzasi.nas.worth import Agreement, Region

__all__ = ["Summary", "findings", "html", "markdown", "summarise", "table", "write_report"]

COLUMNS = 100
COLUMN_NAMES = [
    "rank",
    "architecture",
    "group",
    "params",
    "proxy",
    "tokens",
    "bits/byte",
    "tok/s",
    "state 1k",
]
LEFT_ALIGNED = {
    "architecture", "group", "best", "family", "predictor", "candidate", "reason", "setting",
    "value", "baseline", "training", "scores by learning rate",
}  # fmt: skip
Rows = list[list[str]]


def table(summary: Summary) -> str:
    """The table of candidates and the findings, as plain text in 100 columns."""
    said = "\n".join(textwrap.fill(text, COLUMNS) for text in findings(summary))
    if not summary.standings:
        return said
    rows = [COLUMN_NAMES, *(_cells(s) for s in summary.standings)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMN_NAMES))]
    spare = COLUMNS - sum(widths) - 2 * (len(widths) - 1)
    widths[1] = max(len("architecture"), widths[1] + min(0, spare))
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([lines[0], rule, *lines[1:], "", said])


def markdown(summary: Summary) -> str:
    """The report without its plots, as Markdown."""
    said = "\n".join(f"- {_md(text)}" for text in findings(summary))
    text = f"# {_md(_headline(summary))}\n\n{said}"
    for part in _tables(summary):
        body = _md_table(part.rows) if len(part.rows) > 1 else part.missing
        text += f"\n\n## {part.title}\n\n{body}"
    return f"{text}\n\nThe plots are in report.html.\n"


def html(summary: Summary) -> str:
    """The whole report as one HTML page."""
    said = "".join(f"<li>{escape(text)}</li>" for text in findings(summary))
    candidates, *others = _tables(summary)
    small = [part for part in others if part.small]
    large = [part for part in others if not part.small]
    scores, layers, *plots = map(_html_figure, figures(summary))
    title = escape(_headline(summary))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>'
        f'{title}</title><meta name="viewport" content="width=device-width">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">"
        f"<style>{PAGE_STYLE}{STYLE}</style></head><body><main>"
        f'<header><h1>{title}</h1><div class="cards">{_cards(summary)}</div></header>'
        f"<section><h2>Findings</h2><ul>{said}</ul></section>"
        f'<div class="pair">{scores}{layers}</div>{_html_table(candidates)}'
        f'<div class="pair">{"".join(plots)}</div>'
        f'<div class="pair">{"".join(map(_html_table, small))}</div>'
        f"{''.join(map(_html_table, large))}</main></body></html>\n"
    )


def write_report(folder: Path, events: Iterable[Event]) -> None:
    """Write report.md and report.html, each in one move.

    Raises:
        StudyError: the folder cannot be written; names the file and the way out.
    """
    summary = summarise(events)
    for name, text in (("report.md", markdown(summary)), ("report.html", html(summary))):
        path = folder / name
        partial = folder / f"{name}.partial"
        try:
            partial.write_text(text, "utf-8", errors="replace")  # names of files may be no text
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise StudyError(
                f"{path}: cannot write the report: {error.strerror}; make room or make the "
                "folder writable, then --resume; the journal is intact"
            ) from error


def _headline(summary: Summary) -> str:
    name = summary.study.get("corpus", {}).get("name")
    return f"Architecture search on {name}" if name else "Architecture search"


def _cells(standing: Standing) -> list[str]:
    entry, scored = standing.entry, standing.scored
    speed, proxy = standing.tokens_per_second, entry["proxy"]
    return [
        "-" if standing.rank is None else str(standing.rank),
        entry["name"],
        entry["group"],
        f"{entry['params']:,}",
        "-" if proxy is None else f"{proxy:.3f}",
        short(scored["tokens"]) if scored else "-",
        f"{scored['bits_per_byte']:.3f}" if scored else "failed" if standing.trials else "waiting",
        "-" if speed is None else short(speed),
        f"{short(entry['state_bytes'])}B",
    ]


def _aligned(row: list[str], widths: list[int]) -> list[str]:
    cells = []
    for name, cell, width in zip(COLUMN_NAMES, row, widths, strict=True):
        cell = cell if len(cell) <= width else cell[: width - 1] + "…"
        cells.append(cell.ljust(width) if name in LEFT_ALIGNED else cell.rjust(width))
    return cells


@dataclass(frozen=True)
class Part:
    """A table of the report.

    Args:
        title: its heading.
        rows: the first one holds the names of the columns.
        missing: what is said if there is no other row.
        small: takes half of the page.
        marked: the row to stand out, counted without the names.
    """

    title: str
    rows: Rows
    missing: str
    small: bool = False
    marked: int | None = None


def _tables(summary: Summary) -> list[Part]:
    """Every table of the report, candidates first."""
    ids = [standing.entry["id"] for standing in summary.standings]
    won = ids.index(summary.winner.entry["id"]) if summary.winner else None
    return [
        Part("Candidates", _candidates(summary), "No candidate is there yet.", marked=won),
        Part("Rungs", _rungs(summary), "No trial has ended yet."),
        Part("What the proxy was worth", _worth(summary), "No candidate with a proxy is trained."),
        Part("Final training", _finals(summary), "Not yet begun.", True),
        Part("Baselines on the held-out bytes", _baselines(summary), "Not yet measured.", True),
        Part("Learning rates", _sweeps(summary), "No sweep has ended yet.", True),
        Part("Estimated over real parameters", _estimates(summary), "No candidate is there.", True),
        Part("Failures", _failures(summary), "No trial failed."),
        Part("Settings and data", _settings(summary), "Not yet written."),
    ]


def _candidates(summary: Summary) -> Rows:
    estimates = (s.entry["estimated_params"] for s in summary.standings)
    listed = ["-" if estimate is None else f"{estimate:,}" for estimate in estimates]
    rows = [COLUMN_NAMES, *(_cells(s) for s in summary.standings)]
    return [r[:4] + [e] + r[4:] for r, e in zip(rows, ["estimated", *listed], strict=True)]


def _rungs(summary: Summary) -> Rows:
    rows = [
        [
            rung.name,
            f"{rung.tokens:,}",
            str(rung.trained),
            str(rung.failed),
            "-" if rung.best is None else f"{rung.best:.3f}",
            rung.best_name,
            f"{rung.seconds:.0f}",
        ]
        for rung in summary.rungs
    ]
    return [["rung", "tokens", "trained", "failed", "bits/byte", "best", "seconds"], *rows]


def _finals(summary: Summary) -> Rows:
    rows = [["training", "architecture", "params", "tokens", "seeds", "bits/byte"]]
    for name, final in (("winner", summary.winner), ("best preset", summary.preset)):
        if final:
            sizes = [f"{final.entry['params']:,}", f"{final.tokens:,}", str(len(final.trials))]
            rows.append([name, final.entry["name"], *sizes, str(final).removesuffix(" bits/byte")])
    return rows


def _baselines(summary: Summary) -> Rows:
    baselines: dict[str, float] = summary.study.get("baselines", {})
    rows = [[name, f"{value:.3f}"] for name, value in baselines.items()]
    return [["baseline", "bits/byte"], *rows]


def _worth(summary: Summary) -> Rows:
    names = ["Spearman", "Kendall tau-b", "top-k recall"]
    worth = summary.worth
    if worth is None:
        return [names]
    return [
        ["predictor", "candidates", *names[:2], f"top-{worth.k} recall"],
        *_region("in the band", worth.in_band),
        *_region("all", worth.everywhere),
    ]


def _region(place: str, region: Region) -> Rows:
    predictors: list[tuple[str, Agreement]] = [
        ("proxy", region.proxy),
        ("parameters only", region.parameters),
        ("random", region.random),
    ]
    return [
        [
            f"{name}, {place}",
            str(region.n),
            str(a.spearman),
            str(a.kendall_tau_b),
            f"{a.top_k_recall}",
        ]
        for name, a in predictors
    ]


def _sweeps(summary: Summary) -> Rows:
    rows = []
    for sweep in summary.sweeps:
        scores = sweep["scores"].items()
        listed = ", ".join(f"{lr}: {'failed' if s is None else f'{s:.3f}'}" for lr, s in scores)
        rows.append([sweep["family"], f"{sweep['lr']:g}", listed])
    return [["family", "chosen", "scores by learning rate"], *rows]


def _estimates(summary: Summary) -> Rows:
    ratios = summary.estimate_ratios.items()
    rows = [[family, str(n), f"{ratio:.2f}"] for family, (ratio, n) in ratios]
    return [["family", "candidates", "median ratio"], *rows]


def _failures(summary: Summary) -> Rows:
    rows = [
        [name, trial["rung"], f"{trial['lr']:g}", str(trial["seed"]), why.strip()]
        for name, trial, why in summary.failures
    ]
    return [["candidate", "rung", "lr", "seed", "reason"], *rows]


def _settings(summary: Summary) -> Rows:
    named = (("corpus", "corpus"), ("config", ""))
    pairs = [
        (f"{prefix} {name}".strip(), str(value))
        for key, prefix in named
        for name, value in summary.study.get(key, {}).items()
    ]
    return [["setting", "value"], *map(list, pairs)]


def _md(text: str) -> str:
    """Text as itself: no character of it means anything to Markdown, HTML or a terminal."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    return re.sub(r"([\\`*_\[\]#|~])", r"\\\1", escape(line, quote=False))


def _md_table(rows: Rows) -> str:
    rule = [":--" if name in LEFT_ALIGNED else "--:" for name in rows[0]]
    lines = [[_md(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))


def _html_table(part: Part) -> str:
    title = f"<h2>{escape(part.title)}</h2>"
    if len(part.rows) < 2:
        return f'<section>{title}<p class="missing">{escape(part.missing)}</p></section>'
    names, *rows = part.rows
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
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _cell(text: str) -> str:
    """Tracebacks show their last line and open on a click."""
    first, *rest = text.splitlines()[::-1] or [""]
    if not rest:
        return escape(first)
    return f"<details><summary>{escape(first)}</summary><pre>{escape(text)}</pre></details>"


def _html_figure(figure: Figure) -> str:
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>" if figure.caption else ""
    return f"<figure><h2>{escape(figure.title)}</h2>{figure.svg}{caption}</figure>"


def _cards(summary: Summary) -> str:
    winner, preset, leader = summary.winner, summary.preset, summary.leader
    cards = []
    if winner:
        cards.append((str(winner).removesuffix(" bits/byte"), "bits/byte of the winner"))
    if preset:
        cards.append((str(preset).removesuffix(" bits/byte"), "bits/byte of the best preset"))
    if leader:
        cards.append((f"{leader['params']:,}", "parameters"))
        cards.append((f"{short(leader['state_bytes'])}B", "state at 1,024 tokens"))
    cards.append((str(len(summary.trials)), "trials" if summary.finished else "trials so far"))
    return "".join(f"<p><b>{escape(value)}</b>{escape(text)}</p>" for value, text in cards)


PAGE_STYLE = """
:root { color-scheme: light dark; --ink: #16191d; --soft: #5c6670; --rule: #e1e5ea; --paper: #fff;
  --ground: #f4f6f8; --winner: #c7254e; --proxy: #2766d9; --random: #c77700; --preset: #2b8a5f;
  --outside: #8a4fbf; --baseline: #98a2ad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebee; --soft: #9aa5b1; --rule: #2c333b;
  --paper: #181c21; --ground: #101317; --winner: #ff6b8b; --proxy: #6ea4ff; --random: #f0a740;
  --preset: #54c795; --outside: #c08cf0; --baseline: #5f6b77; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 27px; line-height: 1.25; letter-spacing: -.015em; margin: 0 0 18px;
  overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 12px; letter-spacing: -.005em; }
section, figure { background: var(--paper); border: 1px solid var(--rule); border-radius: 12px;
  padding: 20px 22px; margin: 0 0 18px; min-width: 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr));
  gap: 0 18px; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin-bottom: 18px; }
.cards p { margin: 0; padding: 12px 18px; background: var(--paper); color: var(--soft);
  border: 1px solid var(--rule); border-radius: 12px; font-size: 13px; }
.cards b { display: block; color: var(--ink); font-size: 21px; font-weight: 620;
  font-variant-numeric: tabular-nums; }
ul { margin: 0; padding-left: 20px; } li { margin: 0 0 6px; max-width: 90ch; }
figcaption, .missing { color: var(--soft); font-size: 13px; margin: 10px 0 0; }
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
