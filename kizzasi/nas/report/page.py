"""report.html: the verdict, then pictures, then tables that sort, then statistics to unfold.

One file that fetches nothing: its policy forbids the browser to load anything and to run any script
but the one of style.py, by its digest. Every text from outside is escaped. What there is nothing to
say of is left out.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable
from html import escape

from kizzasi.nas.report.figures import Figure, figures
from kizzasi.nas.report.sentences import conclusions, verdict
from kizzasi.nas.report.style import PAGE_STYLE, SCRIPT
from kizzasi.nas.report.svg import STYLE, short
from kizzasi.nas.report.tables import LEFT_ALIGNED, Part, finalist_tables, tables
from kizzasi.nas.results.summary import Summary
from kizzasi.nas.results.words import gist, printable

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # of names from outside; not tabs and lines
FOLDED = ("What the proxy was worth", "Estimated over real parameters", "Settings and data")


def html(summary: Summary) -> str:
    """The whole report as one HTML page."""
    drawn = figures(summary)
    finals = [part.title for part in finalist_tables(summary)]
    parts = {part.title: part for part in tables(summary) if not part.plotted}
    first = [parts.pop(title) for title in ("Candidates", finals[0])]
    folded = [parts.pop(title) for title in FOLDED]
    fronts = [part for title, part in parts.items() if title in (*finals, "Pareto fronts")]
    rest = [part for title, part in parts.items() if title not in (*finals, "Pareto fronts")]
    sections = [
        ("Pictures", _pictures((*drawn.training, *drawn.fronts))),
        *((part.title, _table(part)) for part in first),
        ("All conclusions", _conclusions(summary)),
        ("On other terms", _folded("Finalists and fronts on other terms", fronts)),
        ("Statistics", _folded("Rungs, baselines, learning rates, failures", rest)),
        ("Proxies", _folded("What proxies were worth", folded[:2], drawn.proxies)),
        ("Settings", _folded("Settings and data", folded[2:])),
    ]
    shown = [(name, body) for name, body in sections if body]
    links = "".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name, _ in shown)
    body = "".join(f'<div id="{_anchor(name)}">{content}</div>' for name, content in shown)
    title = escape(headline(summary))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>'
        f'{title}</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        f"style-src 'unsafe-inline'; img-src data:; script-src '{_digest(SCRIPT)}'\">"
        f"<style>{PAGE_STYLE}{STYLE}</style></head><body><main>"
        f'<header><h1>{title}</h1><p class="verdict">{escape(verdict(summary))}</p>'
        f'<div class="cards">{_cards(summary)}</div>{_next_commands(summary)}'
        f'<nav aria-label="Contents">{links}</nav></header>{_sample(summary)}{body}'
        f'<div id="hint" role="status" hidden></div></main><script>{SCRIPT}</script>'
        "</body></html>\n"
    )
    return CONTROLS.sub("\ufffd", page)


def headline(summary: Summary) -> str:
    name = summary.data.get("name")
    return f"Architecture search on {name}" if name else "Architecture search"


def _digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _anchor(name: str) -> str:
    return re.sub(r"[^a-z]+", "-", name.lower()).strip("-")


def _sample(summary: Summary) -> str:
    """A text by the model that was saved."""
    if not summary.sample:
        return ""
    text = escape(printable(summary.sample["text"]))
    note = "drawn once, with a fixed seed; kizzasi generate draws others"
    return (
        f'<section><h2>What the saved model writes</h2><pre class="sample">{text}</pre>'
        f'<p class="note">{note}</p></section>'
    )


def _conclusions(summary: Summary) -> str:
    said = "".join(f"<li>{escape(text)}</li>" for text in conclusions(summary))
    return f"<section><h2>All conclusions</h2><ul>{said}</ul></section>" if said else ""


def _pictures(drawn: Iterable[Figure]) -> str:
    shown = "".join(_figure(figure) for figure in drawn if figure.drawn)
    return f'<div class="pair">{shown}</div>' if shown else ""


def _figure(figure: Figure) -> str:
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>" if figure.caption else ""
    return (
        f'<figure><h2>{escape(figure.title)}</h2><div class="scroll">{figure.svg}</div>'
        f'<p class="swipe">swipe sideways for the whole picture</p>{caption}</figure>'
    )


def _folded(title: str, parts: Iterable[Part], drawn: Iterable[Figure] = ()) -> str:
    """Tables and plots behind one click; nothing if all are empty."""
    inside = _pictures(drawn) + "".join(_table(part) for part in parts)
    if not inside:
        return ""
    summary = f"<summary><h2>{escape(title)}</h2></summary>"
    return f'<details class="fold">{summary}{inside}</details>'


def _table(part: Part) -> str:
    """A table that a click on a column's name sorts; nothing if it has no row."""
    if len(part.rows) < 2:
        return ""
    names, *rows = part.rows
    note = f'<p class="note">{escape(part.note)}</p>' if part.note else ""
    style = ["" if name in LEFT_ALIGNED else ' class="number"' for name in names]
    head = "".join(
        f'<th scope="col"{s} aria-sort="none"><button>{escape(name)}</button></th>'
        for s, name in zip(style, names, strict=True)
    )
    body = ""
    for i, row in enumerate(rows):
        cells = (f"<td{s}>{_cell(cell)}</td>" for s, cell in zip(style, row, strict=True))
        mark = ' class="won"' if i == part.marked else ""
        body += f"<tr{mark}>{''.join(cells)}</tr>"
    return (
        f'<section><h2>{escape(part.title)}</h2><div class="scroll"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>{note}</section>"
    )


def _cell(text: str) -> str:
    """Tracebacks show what they come to and open on a click."""
    if len(text.splitlines()) < 2:
        return escape(text)
    return f"<details><summary>{escape(gist(text))}</summary><pre>{escape(text)}</pre></details>"


def _cards(summary: Summary) -> str:
    winner, preset, leader = summary.winner, summary.preset, summary.leader
    cards = []
    if winner:
        cards.append((summary.numbers(winner), f"{summary.unit}, best searched model"))
    if preset:
        cards.append((summary.numbers(preset), f"{summary.unit}, best preset"))
    if leader:
        cards.append((f"{leader['params']:,}", "parameters of the best searched model"))
        cards.append((f"{short(leader['state_bytes'])}B", "its state after 1,024 tokens"))
    cards.append((str(len(summary.trials)), "trials" if summary.finished else "trials so far"))
    return "".join(f"<p><b>{escape(value)}</b>{escape(text)}</p>" for value, text in cards)


def _next_commands(summary: Summary) -> str:
    """What to type next, in the run's folder."""
    if not summary.finished:
        lines = ["kizzasi search --resume --out .    # go on"]
    else:
        lines = [
            "# in the folder of this report",
            "kizzasi info best              # the model that was saved",
            "kizzasi generate best          # what it writes, if it was trained on text",
            "kizzasi export . --out model   # weights, card and a script, to give away",
        ]
    listed = escape("\n".join(lines))
    return f'<pre class="commands" aria-label="Next commands">{listed}</pre>'
