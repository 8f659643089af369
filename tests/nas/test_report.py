"""The report says what the journal holds: hand-computed numbers, and pages that a browser takes."""

import base64
import hashlib
import json
import math
import re
import shutil
import statistics
import subprocess
from functools import cache
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up_runs import (
    HOSTILE,
    RUNGS,
    candidate,
    complete_events,
    evolved_events,
    study,
    trial,
)

import kizzasi.nas.results.summary as summary_module
from kizzasi.errors import StudyError
from kizzasi.nas.report.figures import choices_of, figures, progress
from kizzasi.nas.report.pages import (
    conclusions,
    ending,
    html,
    markdown,
    summarise,
    table,
    write_report,
)
from kizzasi.nas.report.sentences import verdict
from kizzasi.nas.report.style import SCRIPT
from kizzasi.nas.report.svg import Axis, short
from kizzasi.nas.report.tables import finalist_rows, spark, tables
from kizzasi.nas.results.finals import Final
from kizzasi.nas.results.lineage import Node, ancestry, lineage, mermaid
from kizzasi.nas.results.noise import noise_of, t_quantile
from kizzasi.nas.searchers import pareto_front
from kizzasi.nas.study.journal import Journal, read_events

GEOMETRY = {"d", "x", "y", "x1", "x2", "y1", "y2", "width", "height", "viewbox", "transform"}
VOID = {"meta", "br", "hr", "img", "link"}


CASES = {
    "empty": [],
    "begun": [study()],
    "sampled": complete_events()[:15],
    "first trial": complete_events()[:16],
    "half-done": complete_events()[:40],
    "before the result": complete_events()[:-1],
    "complete": complete_events(),
    "failures": complete_events(failures=True),
    "evolved": evolved_events(),
    "evolving": evolved_events()[:23],
    "hostile": complete_events(name=HOSTILE),
    "only failures": [
        study(),
        candidate(2, "proxy", "mamba", 9, 0.5),
        {**trial(candidate(2, "proxy", "mamba", 9, 0.5), "0", None, 0), "failure": "leaks"},
    ],
}


@cache
def summary_of(name):
    return summarise(CASES[name])


class Page(HTMLParser):
    """Collects what a page holds and fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.figures = [], [], "", []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "figure":
            self.figures.append([])
        if "figure" in self.open:
            self.figures[-1].append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def classes(figure):
    return {name for _, attrs in figure for name in (attrs.get("class") or "").split()}


@pytest.mark.parametrize("name", CASES)
def test_page_stands_alone_and_every_plot_has_marks(name):
    text = html(summary_of(name))
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert not {"iframe", "object", "embed", "link", "img"} & set(tags)
    assert tags.count("script") == 1
    assert f"<script>{SCRIPT}</script>" in text
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.tags:
        assert not {"src", "srcset", "action", "data"} & attrs.keys(), (tag, attrs)
        assert attrs.get("href", "#hint")[1:] in ids, (tag, attrs)
        assert not [key for key in attrs if key.startswith("on")], (tag, attrs)
    assert not re.search(r"https?://|@import|url\(", text)
    assert (len(page.figures) > 0) == (name not in ("empty",))
    for figure in page.figures:
        tags = [tag for tag, _ in figure]
        assert {"h2", "svg", "title"} <= set(tags)
        assert all(attrs["aria-label"] for tag, attrs in figure if tag == "svg")
        assert {"mark", "line", "box"} & classes(figure) or "rect" in tags
        numbers = " ".join(v for _, attrs in figure for k, v in attrs.items() if k in GEOMETRY)
        assert not re.search("nan|inf|none", numbers, re.I)


@pytest.mark.parametrize("name", CASES)
def test_text_fits_a_terminal(name):
    for text in (table(summary_of(name)), ending(summary_of(name), Path("runs/a b"))):
        assert text
        assert max(map(len, text.splitlines())) <= 100


def test_the_end_of_a_search_is_short_and_says_what_to_type(tmp_path):
    text = ending(summary_of("complete"), Path("runs/a b"))
    assert text.count("\n") < 40
    assert "... and 2 more in the report" in text
    assert "it writes:\n  def of_the_winner():\n      topics\n  xxxx" in text
    assert "  kizzasi generate 'runs/a b'" in text
    hostile = ending(summary_of("hostile"), Path("x"))
    assert all(c.isprintable() or c == "\n" for c in hostile)
    assert "it writes" not in ending(summarise(CASES["complete"][:-2]), Path("x"))


def test_the_verdict_says_when_a_preset_was_saved():
    *events, result = complete_events(gap=-0.1)
    said = verdict(summarise([*events, {**result, "best": result["preset"]}]))
    assert said.count(". ") == 0
    assert "behind the best preset, mamba preset, by 0.100 bits/byte" in said
    assert said.endswith("; the preset, the better one, is what was saved.")


def test_the_verdict_says_what_of_a_lead_is_owed_to_settings():
    """A preset's architecture that a search drew with a better rate was .067 ahead of itself."""
    events = complete_events()
    finals = {e["candidate"]: e for e in events if e["event"] == "trial" and e["rung"] == "final"}
    by_id = {e["id"]: e for e in events if e["event"] == "candidate"}
    preset = next(by_id[own] for own in finals if by_id[own]["group"] == "preset")
    winner = next(by_id[own] for own in finals if by_id[own]["group"] != "preset")
    assert "other settings" not in verdict(summarise(events))
    as_preset = [{**e, "spec": preset["spec"]} if e is winner else e for e in events]
    assert "; it is that preset's architecture at other settings." in verdict(summarise(as_preset))
    twin = {**preset, "id": "twin", "group": "random", "name": "twin, lr 0.016"}
    more = [twin]
    for e in events:
        if e["event"] == "trial" and e["candidate"] == preset["id"] and e["rung"] == "final":
            more.append({**e, "id": f"{e['id']}t", "candidate": "twin", "score": e["score"] - 0.01})
    *rest, result = events
    said = verdict(summarise([*rest, *more, result]))
    assert re.search(
        r"; that preset's architecture at other settings, twin, lr 0.016, stands", said
    )


def test_complete_plots_are_all_drawn():
    page = Page(html(summary_of("complete")))
    _, _, best, curves, seeds, mattered, params, state, scatter = page.figures
    assert sum("mark" in attrs.get("class", "").split() for _, attrs in seeds) == 3 + 3
    assert {"noise", "mean", "whisker"} <= classes(seeds)
    # one line per candidate that trained at all, and three of them named
    assert sum("line" in attrs.get("class", "").split() for _, attrs in curves) == 14
    assert sum(attrs.get("class") == "name" for _, attrs in curves) == 3
    assert sum("line" in attrs.get("class", "").split() for _, attrs in best) == 1
    assert sum("box" in attrs.get("class", "").split() for _, attrs in mattered) == 4
    assert sum("mark" in attrs.get("class", "").split() for _, attrs in scatter) == 12 + 4  # legend
    for figure in (params, state):
        assert sum("mark" in attrs.get("class", "").split() for _, attrs in figure) == 14 + 5 + 5
        assert {"link", "early"} <= classes(figure)
    assert "front" in classes(params)


def test_the_page_begins_with_the_verdict_and_leaves_out_what_is_empty():
    text = html(summary_of("complete"))
    said = (
        "The best searched model is mamba+transformer d96 L4 n16 x2 (210,494 parameters) at 2.320 "
        "± 0.020 bits/byte, ahead of the best preset, mamba preset, by 0.100 bits/byte, more than "
        "the noise floor of 0.010 (95 %, paired over 3 seeds)."
    )
    assert text.index("<h1>") < text.index(said) < text.index("<figure>") < text.index("<table>")
    assert "missing" not in text.replace("is missing", "")
    nothing = html(summarise([]))
    assert "<figure>" not in nothing
    assert "<table>" not in nothing
    assert "kizzasi search --resume" in nothing


def test_the_best_so_far_counts_every_token_once():
    one, other = (candidate(i, "searched", "mamba", 9, None) for i in (2, 3))
    events = [study(), one, other, trial(one, "0", 3.0, 100), trial(other, "0", 3.5, 100)]
    events.append(trial(one, "1", 2.5, 300))  # goes on from its first 100
    title = "tokens, all trainings together"
    figure = next(f for f in figures(summarise(events)).training if title in f.svg)
    assert "best score so far: 2.500" in figure.svg
    lines = [(spent, score) for spent, score in progress(summarise(events))]
    assert lines == [(100, 3.0), (400, 3.0), (400, 2.5), (401, 2.5)]


def test_choices_are_counted_from_the_spec():
    entry = candidate(2, "searched", "mamba+transformer", 9, None)
    wanted = {"layers": 4, "channels (d_model)": 96}
    wanted |= {"mamba layers": 2, "attention layers": 2, "swiglu layers": 2}
    assert choices_of(entry["spec"]) == wanted


def test_the_table_of_candidates_has_the_columns_that_say_something():
    head, *rows = tables(summary_of("complete"))[0].rows
    known = ["rank", "architecture", "group", "params"]
    after = ["tokens", "bits/byte", "tok/s", "state 1k"]
    assert head == [*known, "estimated", "proxy", *after]
    assert {len(row) for row in rows} == {len(head)}
    assert tables(summary_of("evolved"))[0].rows[0] == [*known, *after]
    assert tables(summary_of("empty"))[0].rows == [[*known, "estimated", "proxy", *after]]


def test_standings_follow_the_result_and_equal_those_without_it():
    events = CASES["complete"]
    summary = summarise(events)
    ids = [s.entry["id"] for s in summary.standings]
    assert ids == events[-1]["ranking"]
    assert [s.rank for s in summary.standings] == list(range(1, 15))
    assert [s.entry["id"] for s in summarise(events[:-1]).standings] == ids
    assert (summary.finished, summary_of("before the result").finished) == (True, False)
    shuffled = {**events[-1], "ranking": ids[::-1]}
    assert [s.entry["id"] for s in summarise([*events[:-1], shuffled]).standings] == ids[::-1]


def test_only_the_chosen_learning_rate_counts():
    """The sweep's better score at another rate (made up here) must not enter the ranking."""
    summary = summary_of("complete")
    swept = summary.standings[0]
    assert swept.entry["id"] == summary.sweeps[0]["candidate"]
    assert {t["settings"]["lr"] for s in summary.standings for t in s.trials} == {6e-3}
    assert swept.score("0") == pytest.approx(summary.sweeps[0]["scores"]["lr 0.006"])
    sweeping = summarise(CASES["complete"][:16])  # one trial, no rate chosen yet
    assert sweeping.standings[0].score("0") == pytest.approx(swept.score("0") - 1)


def test_numbers_by_hand():
    summary = summary_of("complete")
    assert summary.winner.entry["group"] == "proxy"
    assert summary.winner.mean == pytest.approx(2.32)
    assert summary.winner.spread == pytest.approx(0.02)
    assert summary.preset.mean == pytest.approx(2.42)
    assert [(r.name, r.tokens, r.trained, r.failed) for r in summary.rungs] == [
        ("0", RUNGS[0], 14, 0),
        ("1", RUNGS[1], 5, 0),
    ]
    assert summary.rungs[1].seconds == 10
    assert summary.rungs[1].best == min(s.score("1") for s in summary.standings[:5])
    # candidates 3, 6, 9, 12 are mamba: estimates 0.53 to 0.62 of the real count
    ratio, n = summary.estimate_ratios["mamba"]
    assert (n, ratio) == (4, pytest.approx((0.56 + 0.59) / 2, abs=1e-5))
    row = next(line for line in table(summary).splitlines() if line.startswith("   1 "))
    best = summary.standings[0]
    assert row.split()[-5:] == ["-", "98.3k", f"{best.score('1'):.3f}", "49.2k", "10kB"]


def test_worth_of_the_proxy():
    summary = summary_of("complete")
    agreement = summary.agreements["proxy"]
    assert agreement.everywhere.n == 12, "no presets"
    assert agreement.in_band.n == 10, "2 outside the band"
    assert "the proxy beats a random ranking" in " ".join(conclusions(summary))
    failed = summary_of("failures").agreements["proxy"]
    assert (failed.everywhere.n, failed.n_dropped) == (12, 0)  # a failure ranks last
    low, high = (found.everywhere.proxy.kendall_tau_b.value for found in (failed, agreement))
    assert low < high
    turned = [
        {**e, "proxy": -e["proxy"]} if e.get("proxy") is not None else e for e in CASES["complete"]
    ]
    lost = summarise(turned)
    for text in (table(lost), markdown(lost), html(lost)):
        assert "the proxy loses to a random ranking" in " ".join(text.split())


@pytest.mark.parametrize(
    ("seeds", "gap", "said"),
    [
        (3, 0.1, "The winner beats the preset by 0.100"),
        (3, -0.1, "The winner loses to the preset by 0.100"),
        (3, 0.0101, "more than the noise floor of 0.010 (95 %, paired over 3 seeds)"),
        (3, 0.0098, "This is a tie: 0.010 bits/byte are within the noise floor of 0.010"),
        (1, 0.1, "The winner is ahead by 0.104 bits/byte; without two seeds"),
        (1, -0.1, "The winner is behind by 0.096 bits/byte; without two seeds"),
    ],
)
def test_winner_against_preset(seeds, gap, said):
    summary = summarise(complete_events(seeds, gap))
    assert said in " ".join(conclusions(summary))
    assert (summary.winner.spread is None) == (seeds == 1)


def test_the_noise_floor_by_hand():
    """Two finalists: the paired t-test. Three: residuals of rows and columns."""

    def made(*rows):
        trials = [[{"seed": s, "score": y} for s, y in enumerate(row)] for row in rows]
        return [Final({}, tuple(own)) for own in trials]

    gaps = [0.1, 0.2, 0.15, 0.05]
    two = noise_of(made([1.0, 2.0, 3.0, 4.0], [1.1, 2.2, 3.15, 4.05]))
    assert two.floor == pytest.approx(3.1824 * statistics.stdev(gaps) / math.sqrt(4), rel=1e-4)
    assert (two.seeds, two.freedom) == ((0, 1, 2, 3), 3)
    three = noise_of(made([1.0, 2.0], [1.0, 2.3], [1.0, 2.0]))
    assert three.floor == pytest.approx(6.2053 * math.sqrt(0.03 / 2), rel=1e-4)
    a, b, _ = made([1.0, 2.0], [1.0, 2.3], [1.0, 2.0])
    assert three.gap(a, b) == pytest.approx(0.15)
    assert three.tied(a, b)
    assert noise_of(made([1.0, None], [1.1, 2.2])) is None  # one seed in common
    assert noise_of(made([1.0, 2.0], [None, None])) is None
    assert noise_of([]) is None
    for freedom, quantile in ((1, 12.706), (10, 2.228), (11, 2.201), (30, 2.042), (10**6, 1.960)):
        assert t_quantile(0.975, freedom) == pytest.approx(quantile, abs=1e-3)


def test_finalists_within_the_noise_floor_are_tied():
    summary = summary_of("evolved")
    assert [row[-1] for row in finalist_rows(summary)[1:]] == [
        "best mean",
        "+0.004, tied",
        "+0.200, worse",
    ]
    assert "and so tied: child 19." in " ".join(conclusions(summary))
    assert summary.winner.entry["name"] == "child 18"
    assert "Refused before any training, by rule: n_params 7." in conclusions(summary)
    single = summarise(complete_events(final_seeds=1))
    assert finalist_rows(single)[2][-1] == "not told apart: too few seeds"
    assert "two seeds in common to state a noise floor" in html(single)


def test_every_proxy_has_its_plot_and_stands_beside_parameters_and_random():
    summary = summary_of("evolved")
    assert list(summary.agreements) == ["snip", "naswot"]
    page = Page(html(summary))
    for name in ("snip", "naswot"):
        assert f"Proxy {name} against training" in page.text
    (agreement,) = [part for part in tables(summary) if part.title == "What the proxy was worth"]
    assert [row[0] for row in agreement.rows[1:5]] == [
        "snip, in the band",
        "naswot, in the band",
        "parameters only, in the band",
        "random, in the band",
    ]
    assert "snip 0.9" in " ".join(conclusions(summary))


def test_lineage_leads_from_the_first_generation_to_the_winner():
    summary = summary_of("evolved")
    nodes = lineage(summary)
    line = ancestry(nodes, [summary.winner.entry["id"]])
    generations = [node.generation for node in line.values()]
    assert generations == sorted(generations)
    assert (generations[0], generations[-1], len(nodes)) == (0, 3, 24)
    assert list(line.values())[-1].winner
    drawn = mermaid(list(line.values()), summary.metric)
    assert drawn.count("-->|inherits 75%|") == sum(len(n.parents) for n in line.values())
    text = markdown(summary)
    assert f"```mermaid\n{drawn}\n```" in text
    told = json.loads(text.split("```json\n")[1].split("```")[0])
    assert [node["id"] for node in told] == list(line)
    unknown = {**candidate(1, "evolved", "mamba", 9, None), "parents": ["nobody", "0" * 11 + "1"]}
    assert lineage(summarise([unknown]))["0" * 11 + "1"].parents == ()


def test_a_tree_too_large_for_a_screen_is_drawn_from_its_last_nodes():
    nodes = [Node(f"{i}", f"n{i}", "evolved", 9, (f"{i - 1}",), i, None, 1.5) for i in range(45)]
    lines = mermaid(nodes, summary_of("evolved").metric).splitlines()
    assert len(lines) == 1 + 40 + 39  # the first one's parent is not on it
    assert lines[1] == '  n0["n5<br/>1.500 bits/byte"]'
    assert lines[-1] == "  n38 --> n39"


def test_of_very_many_an_evenly_spread_share_judges_proxies(monkeypatch):
    monkeypatch.setattr(summary_module, "_agreement", lambda tried, name: tried)
    every = summarise(complete_events()).agreements["proxy"]
    monkeypatch.setattr(summary_module, "MOST_COMPARED", 5)
    assert len(every) == 12
    assert summarise(complete_events()).agreements["proxy"] == [every[i] for i in (0, 2, 4, 7, 9)]
    monkeypatch.setattr(summary_module, "MOST_COMPARED", 12)
    assert summarise(complete_events()).agreements["proxy"] == every


def test_an_axis_over_three_decades_has_only_powers_of_ten():
    assert Axis("x", 1, 1000, 0, 9, True).ticks() == [1, 10, 100, 1000]
    assert Axis("x", 1, 999, 0, 9, True).ticks() == [1, 2, 5, 10, 20, 50, 100, 200, 500]


def test_data_of_final_scores_are_named_once_there_are_any():
    told = {name: " ".join(conclusions(summary_of(name))) for name in ("half-done", "complete")}
    assert "Final scores are" not in told["half-done"]
    assert told["complete"].count("Final scores are on the data that also chose") == 1


def test_a_curve_in_one_line():
    assert spark([8.0, 3.0, 1.0]) == "█▃▁"
    assert spark([2.0, 2.0]) == "▁▁"
    assert len(spark([float(i) for i in range(1000)])) <= 32


def test_a_line_has_no_more_points_than_a_screen():
    long = [[t, 9 - t / 5000] for t in range(1, 20_001)]
    events = [{**e, "curve": long} if e["event"] == "trial" else e for e in CASES["complete"]]
    assert len(html(summarise(events))) < len(html(summary_of("complete"))) + 300_000


def test_a_winner_behind_a_baseline_is_named():
    begun, *rest = CASES["complete"]
    weak = [{**begun, "baselines": {"unigram": 4.7, "xz": 2.3}}, *rest]
    assert "the winner 2.320, worse than xz" in " ".join(conclusions(summarise(weak)))
    assert "better than every one of them" in " ".join(conclusions(summary_of("complete")))


def test_failures_keep_their_reasons():
    summary = summary_of("failures")
    reasons = [reason for _, _, reason in summary.failures]
    assert "diverged: 14 nats at step 30; lower the lr" in reasons
    assert summary.standings[-1].rank is None
    assert table(summary).splitlines()[15].split()[-3] == "failed"
    assert "diverged: 14 nats" in markdown(summary)
    assert "<summary>last</summary>" in html(summary)  # the last line, if there are no frames
    crashed = summary_of("evolved")
    said = "RuntimeError: sizes 3 and 4 do not match (scan.py:77 in scan)"
    assert f"<summary>{said}</summary>" in html(crashed)
    assert f"| {said} |" in markdown(crashed)
    assert 'class="cross proxy"' in html(summary)


def test_a_score_that_was_not_finite_is_a_failure_with_that_reason(tmp_path):
    entry = candidate(2, "proxy", "mamba", 200_000, 0.5)
    lost = {**trial(entry, "0", 3.0, RUNGS[0]), "score": math.nan}
    lost["curve"] = [[10_240, 4.0], [20_480, math.inf]]
    with Journal(tmp_path / "journal.jsonl") as journal:
        for event in (study(), entry, lost):
            journal.append(event)
    events = read_events(tmp_path / "journal.jsonl")
    (failure,) = summarise(events).failures
    assert failure[2] == "the held-out score became nan"
    Page(html(summarise(events)))


@pytest.mark.parametrize("write", [markdown, html])
def test_text_from_outside_is_harmless(write):
    text = write(summary_of("hostile"))
    assert "<script>alert" not in text
    assert "&lt;script&gt;" in text
    if write is markdown:
        assert "\x1b" not in text
        rows = [line for line in text.splitlines() if line.startswith("| data ")]
        assert len(re.findall(r"(?<!\\)\|", rows[0])) == 3


def test_written_in_one_move(tmp_path):
    write_report(tmp_path, CASES["hostile"])  # its name is not valid Unicode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.md"]
    before = (tmp_path / "report.md").read_bytes()
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()
    with pytest.raises(StudyError, match=r"report\.html: cannot write the report: .*--resume"):
        write_report(tmp_path, CASES["hostile"])
    assert (tmp_path / "report.md").read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(StudyError, match="cannot write the report"):
        write_report(tmp_path / "nowhere", [])


def test_numbers_in_plots():
    assert pareto_front([(3, 1), (1, 3), (2, 3), (2, 2), (4, 1), (1, 3)]) == [0, 1, 3, 5]
    rounded = [short(value) for value in (0.35, 999, 999.6, 32_768, 1.2e6)]
    assert rounded == ["0.35", "999", "1k", "32.8k", "1.2M"]
    axis = Axis.fit("x", [1, 100], 0, 1)
    assert axis.log
    assert axis.ticks() == [1, 2, 5, 10, 20, 50, 100]
    assert Axis.fit("x", [2, 10.1], 0, 1).log
    assert not Axis.fit("x", [2, 10], 0, 1).log
    for values in ([5.0], [0.0], [-3, 7], [2.0, 2.0 + 1e-9], [160_000, 240_000], [1, 1e12]):
        axis = Axis.fit("x", values, 0, 100)
        assert all(0 <= axis(v) <= 100 for v in values)
        assert 1 <= len(axis.ticks()) <= 20, values


CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"


FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--enable-logging=stderr --log-level=0 --window-size=1240,2400"
)
# In the browser: where each plot's marks are, the size of its letters, what a click and the
# pointer do. `page` is the report in a frame as wide as the screen that is asked for.
PROBE = """<script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument, seen = [];
  const frame = page.documentElement;
  for (const fold of page.querySelectorAll("details")) fold.open = true;
  for (const figure of page.querySelectorAll("figure")) {
    const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
    const inside = b => b.left >= box.left - 1 && b.right <= box.right + 1 &&
      b.top >= box.top - 1 && b.bottom <= box.bottom + 1;
    const marks = [...svg.querySelectorAll(".mark, .line, rect[stroke]")].filter(mark => {
      const b = mark.getBoundingClientRect(), style = getComputedStyle(mark);
      return inside(b) && b.width + b.height > 2 && style.stroke + style.fill != "nonenone";
    });
    const texts = [...svg.querySelectorAll("text")], scale = svg.getScreenCTM().a;
    seen.push({title: figure.querySelector("h2").textContent, height: box.height,
      marks: marks.length, texts: texts.length,
      letters: Math.min(...texts.map(t => scale * parseFloat(getComputedStyle(t).fontSize))),
      cut: texts.filter(t => !inside(t.getBoundingClientRect())).map(t => t.textContent)});
  }
  const out = {seen, overflows: frame.scrollWidth > frame.clientWidth + 1};
  const empty = [...page.querySelectorAll("section, figure, details")].filter(
    part => part.innerText.trim().split("\\n").length < 2);
  out.empty = empty.map(part => part.outerHTML);
  const table = page.querySelector("table"), buttons = table.querySelectorAll("th button");
  const column = i => [...table.tBodies[0].rows].map(row => row.cells[i].textContent);
  buttons[3].click();
  out.rising = column(3);
  buttons[3].click();
  out.falling = column(3);
  const mark = page.querySelector("[data-about]");
  const at = {bubbles: true, clientX: 20, clientY: 20};
  mark.dispatchEvent(new PointerEvent("pointermove", at));
  const hint = page.getElementById("hint");
  out.hint = [hint.hidden, hint.textContent, mark.dataset.about];
  frame.dispatchEvent(new PointerEvent("pointermove", at));
  out.gone = hint.hidden;
  document.body.innerHTML = "<pre>" + JSON.stringify(out).replace(/[&<]/g, " ") + "</pre>";
};
</script>"""


def in_chromium(folder, page, *options):
    return subprocess.run(
        [
            CHROMIUM,
            *FLAGS.split(),
            f"--user-data-dir={folder / 'profile'}",
            *options,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
        check=False,
    )


needs_chromium = pytest.mark.skipif(
    not Path(CHROMIUM).exists(), reason="no /usr/bin/chromium to render the page"
)


@needs_chromium
def test_chromium_renders_without_console_errors(tmp_path):
    write_report(tmp_path, CASES["hostile"])
    picture = tmp_path / "page.png"
    done = in_chromium(tmp_path, tmp_path / "report.html", f"--screenshot={picture}")
    assert picture.stat().st_size > 50_000, done.stderr[-2000:]  # a blank page takes a tenth
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_chromium
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", ["evolved", "complete"])
def test_chromium_draws_sorts_and_tells(name, width, tmp_path):
    page = escape(html(summary_of(name)))
    probed = f'<iframe srcdoc="{page}" style="width: {width}px; height: 900px"></iframe>{PROBE}'
    (tmp_path / "probed.html").write_text(probed, "utf-8", errors="replace")
    done = in_chromium(tmp_path, tmp_path / "probed.html", "--dump-dom")
    assert "<pre>" in done.stdout, done.stderr[-2000:]
    out = json.loads(done.stdout.split("<pre>")[1].split("</pre>")[0])
    assert len(out["seen"]) == (12 if name == "evolved" else 9)
    for figure in out["seen"]:
        assert figure["height"] > 50, figure
        assert figure["marks"] > 0, figure
        assert figure["texts"] > 2, figure
        assert figure["cut"] == [], figure
        assert figure["letters"] >= 11, figure
    assert not out["overflows"]
    assert out["empty"] == []
    sizes = [int(size.replace(",", "")) for size in out["rising"]]
    assert sizes == sorted(sizes)
    assert [int(size.replace(",", "")) for size in out["falling"]] == sizes[::-1]
    hidden, shown, meant = out["hint"]
    assert not hidden
    assert shown == meant != ""
    assert out["gone"]
