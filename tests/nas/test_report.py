"""The report says what the journal holds: hand-computed numbers, and pages that a browser takes."""

import json
import math
import re
import shutil
import statistics
import subprocess
from functools import cache
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

from kizzasi.errors import StudyError
from kizzasi.nas.report.pages import findings, html, markdown, summarise, table, write_report
from kizzasi.nas.report.svg import Axis, pareto_front, short
from kizzasi.nas.report.tables import finalist_rows, spark, tables
from kizzasi.nas.results.finals import Final
from kizzasi.nas.results.lineage import ancestry, lineage, mermaid
from kizzasi.nas.results.noise import noise_of, t_quantile
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
    assert not {"script", "iframe", "object", "embed", "link", "img"} & {
        tag for tag, _ in page.tags
    }
    for tag, attrs in page.tags:
        assert not {"src", "href", "srcset", "action", "data"} & attrs.keys(), (tag, attrs)
        assert not [key for key in attrs if key.startswith("on")], (tag, attrs)
    assert not re.search(r"https?://|@import|url\(", text)
    assert len(page.figures) == (10 if name.startswith("evol") else 8)
    for figure in page.figures:
        tags = [tag for tag, _ in figure]
        assert "h2" in tags
        drawn, missing = "svg" in tags, "missing" in classes(figure)
        assert drawn != missing
        if drawn:
            assert "title" in tags
            assert {"mark", "line", "box"} & classes(figure) or "rect" in tags
        numbers = " ".join(v for _, attrs in figure for k, v in attrs.items() if k in GEOMETRY)
        assert not re.search("nan|inf|none", numbers, re.I)


@pytest.mark.parametrize("name", CASES)
def test_text_fits_a_terminal(name):
    lines = table(summary_of(name)).splitlines()
    assert lines
    assert max(map(len, lines)) <= 100


def test_complete_plots_are_all_drawn():
    page = Page(html(summary_of("complete")))
    seeds, curves, params, state, family, scatter = page.figures[2:]
    assert [f for f in page.figures if "missing" in classes(f)] == [family]
    assert sum("mark" in attrs.get("class", "").split() for _, attrs in seeds) == 3 + 3
    assert {"noise", "mean", "whisker"} <= classes(seeds)
    assert sum("line" in attrs.get("class", "").split() for _, attrs in curves) == 14 + 6
    assert sum("mark" in attrs.get("class", "").split() for _, attrs in scatter) == 12 + 4  # legend
    for figure in (params, state):
        assert sum("mark" in attrs.get("class", "").split() for _, attrs in figure) == 14 + 5 + 5
        assert {"link", "early"} <= classes(figure)
    assert "front" in classes(params)


def test_an_empty_page_says_what_is_missing():
    page = Page(html(summarise([])))
    assert all("missing" in classes(figure) for figure in page.figures)
    for said in ("No candidate has a score yet", "Neither baselines nor final scores"):
        assert said in page.text


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
    worth = summary.worths["proxy"]
    assert (worth.everywhere.n, worth.in_band.n) == (12, 10)  # no presets; 2 outside the band
    assert "the proxy beats a random ranking" in " ".join(findings(summary))
    failed = summary_of("failures").worths["proxy"]
    assert (failed.everywhere.n, failed.n_dropped) == (12, 0)  # a failure ranks last
    assert failed.everywhere.proxy.kendall_tau_b.value < worth.everywhere.proxy.kendall_tau_b.value
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
    assert said in " ".join(findings(summary))
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
    assert "and so tied: child 19." in " ".join(findings(summary))
    assert summary.winner.entry["name"] == "child 18"
    assert "Refused before any training, by rule: n_params 7." in findings(summary)
    single = summarise(complete_events(final_seeds=1))
    assert finalist_rows(single)[2][-1] == "not told apart: too few seeds"
    assert "two seeds in common to state a noise floor" in html(single)


def test_every_proxy_has_its_plot_and_stands_beside_parameters_and_random():
    summary = summary_of("evolved")
    assert list(summary.worths) == ["snip", "naswot"]
    page = Page(html(summary))
    for name in ("snip", "naswot"):
        assert f"Proxy {name} against training" in page.text
    (worth,) = [part for part in tables(summary) if part.title == "What the proxy was worth"]
    assert [row[0] for row in worth.rows[1:5]] == [
        "snip, in the band",
        "naswot, in the band",
        "parameters only, in the band",
        "random, in the band",
    ]
    assert "snip 0.9" in " ".join(findings(summary))


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


def test_a_curve_in_one_line():
    assert spark([8.0, 3.0, 1.0]) == "█▃▁"
    assert spark([2.0, 2.0]) == "▁▁"
    assert len(spark([float(i) for i in range(1000)])) <= 32


def test_a_winner_behind_a_baseline_is_named():
    begun, *rest = CASES["complete"]
    weak = [{**begun, "baselines": {"unigram": 4.7, "xz": 2.3}}, *rest]
    assert "the winner 2.320, worse than xz" in " ".join(findings(summarise(weak)))
    assert "better than every one of them" in " ".join(findings(summary_of("complete")))


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
    assert "<script" not in text
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
    assert pareto_front([(3, 1), (1, 3), (2, 3), (2, 2), (4, 1)]) == [(1, 3), (2, 2), (3, 1)]
    rounded = [short(value) for value in (0.35, 999, 999.6, 32_768, 1.2e6)]
    assert rounded == ["0.35", "999", "1k", "32.8k", "1.2M"]
    axis = Axis.fit("x", [1, 100], 0, 1)
    assert axis.log
    assert axis.ticks() == [1, 2, 5, 10, 20, 50, 100]
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
# Where the browser drew each plot's marks: inside the picture, with a size, in a colour.
PROBE = """<script>
const out = [...document.querySelectorAll("figure")].map(figure => {
  const svg = figure.querySelector("svg");
  if (!svg) return {title: figure.querySelector("h2").textContent, said: figure.innerText};
  const frame = svg.getBoundingClientRect(), seen = box =>
    box.left >= frame.left - 1 && box.right <= frame.right + 1 &&
    box.top >= frame.top - 1 && box.bottom <= frame.bottom + 1;
  const marks = [...svg.querySelectorAll(".mark, .line, rect[stroke]")].filter(mark => {
    const box = mark.getBoundingClientRect(), style = getComputedStyle(mark);
    return seen(box) && box.width + box.height > 2 && style.stroke + style.fill != "nonenone";
  });
  const texts = [...svg.querySelectorAll("text")];
  return {title: figure.querySelector("h2").textContent, height: frame.height,
    marks: marks.length, texts: texts.length,
    cut: texts.filter(t => !seen(t.getBoundingClientRect())).map(t => t.textContent)};
});
document.body.innerHTML = "<pre>" + JSON.stringify(out).replace(/[&<]/g, " ") + "</pre>";
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
def test_chromium_draws_every_plot(tmp_path):
    """Several pages as one, with a probe in place of the policy that forbids scripts."""
    pages = [html(summary_of(name)) for name in ("evolved", "complete", "empty")]
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    page = policy.sub("", "".join(pages)) + PROBE
    (tmp_path / "probed.html").write_text(page, "utf-8", errors="replace")
    done = in_chromium(tmp_path, tmp_path / "probed.html", "--dump-dom")
    figures = json.loads(done.stdout.split("<pre>")[1].split("</pre>")[0])
    assert len(figures) == 10 + 8 + 8, done.stderr[-2000:]
    drawn = [figure for figure in figures if "said" not in figure]
    assert len(drawn) == 10 + 7
    for figure in drawn:
        assert figure["height"] > 50, figure
        assert figure["marks"] > 0, figure
        assert figure["texts"] > 2, figure
        assert figure["cut"] == [], figure
    for figure in figures:
        assert "said" not in figure or len(figure["said"].split("\n")[-1].split()) > 3, figure
