"""The report says what the journal holds: hand-computed numbers, and pages that a browser takes."""

import math
import random
import re
import shutil
import subprocess
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kizzasi.errors import StudyError
from kizzasi.nas.microtrain import Measurement
from kizzasi.nas.report import findings, html, markdown, summarise, table, write_report
from kizzasi.nas.storage import Journal, read_events
from kizzasi.nas.svg import Axis, pareto_front, short

RUNGS = (32_768, 98_304)
FINAL_TOKENS = 262_144
HOSTILE = '<script>alert("x")</script> | `b` \x1b[31m \udcff.txt'
GEOMETRY = {"d", "x", "y", "x1", "x2", "y1", "y2", "width", "height", "viewbox", "transform"}
VOID = {"meta", "br", "hr", "img", "link"}


def spec(family, n_layers, d_model):
    one = {
        "mamba": ({"kind": "mamba", "d_state": 16, "expand": 2.0}, None),
        "transformer": (
            {"kind": "attention", "n_heads": 4, "n_kv_heads": None, "window": None},
            {"kind": "swiglu", "hidden": 3 * d_model},
        ),
    }
    pairs = [one[name] for name in family.split("+")]
    blocks = [
        {"mixer": pairs[i % len(pairs)][0], "channel": pairs[i % len(pairs)][1], "norm": "rms"}
        for i in range(n_layers)
    ]
    stem = {"kind": "tokens", "vocab_size": 256}
    fixed = {"norm": "rms", "norm_eps": 1e-5, "embed_norm": False, "tie_head": False}
    return {"d_model": d_model, "blocks": blocks, "stem": stem, **fixed, "dropout": 0.0}


def candidate(i, group, family, params, proxy):
    name = f"{family} preset" if group == "preset" else f"{family} d96 L4 n16 x{i}"
    named = {"id": f"{i:012x}", "group": group, "name": name, "family": family}
    return {
        "event": "candidate",
        **named,
        "spec": spec(family, 2 + i % 4, 96),
        "proxy": proxy,
        "params": params,
        "estimated_params": None if group == "preset" else round(params * (0.5 + 0.01 * i)),
        "state_bytes": 10_000 * (i + 1) ** 2,
    }


def trial(entry, rung, score, tokens, *, lr=6e-3, seed=0, failure=None, horizon=98_304):
    floor = 2.0 if score is None else score
    steps = range(10_240, tokens + 1, 10_240)
    curve = [[t, floor + 5 * math.exp(-t / 15_000)] for t in steps]
    if failure:
        curve = [*curve[:2], [curve[2][0] if len(curve) > 2 else 30_000, 14.0]]
    run_id = f"{entry['id']}{seed}{lr}{horizon}"
    trained = {"id": f"{run_id}-{tokens}", "rung": rung, "seed": seed, "lr": lr}
    measured = Measurement(score, tokens, 2.0, tokens / 2, curve, failure)
    return {"event": "trial", "candidate": entry["id"], **trained, **measured.to_dict()}


def study(name="topics"):
    corpus = {"name": name, "digest": "ab" * 32, "n_bytes": 600_000, "repeated": 0.0123}
    config = {"n_params": 200_000, "rungs": list(RUNGS), "data": name}
    baselines = {"unigram": 4.7, "bigram": 3.6, "xz": 2.6}
    return {"event": "study", "config": config, "corpus": corpus, "baselines": baselines}


def complete_events(final_seeds=3, gap=0.1, failures=False, name="topics"):
    """A search of 2 presets and 12 candidates, as `kizzasi.nas.search` would write it."""
    rng = random.Random(0)
    families = ("mamba", "transformer", "mamba+transformer")
    entries = [candidate(i, "preset", families[i], 200_000 + i, None) for i in range(2)]
    for i in range(2, 14):
        group = "proxy" if i < 7 else "random" if i < 12 else "outside"
        size = rng.randint(160_000, 240_000) if group != "outside" else 900_000
        entries.append(candidate(i, group, families[i % 3], size, 0.9 - 0.02 * i))
    events = [study(name), *entries]
    first = {e["id"]: 3 + 0.05 * i + rng.uniform(-0.05, 0.05) for i, e in enumerate(entries)}
    broken = entries[5]["id"] if failures else None
    reason = "diverged: 14 nats at step 30; lower the lr" if failures else None
    for family in families:
        entry = next(e for e in entries if e["family"] == family)
        score = first[entry["id"]]
        events.append(trial(entry, "0", score - 1, RUNGS[0], lr=3e-3))  # not the chosen one
        events.append(trial(entry, "0", score, RUNGS[0]))
        events.append(trial(entry, "0", None, RUNGS[0], lr=1.2e-2, failure=f"{HOSTILE}\nlast"))
        scores = {"0.003": score - 1, "0.006": score, "0.012": None}
        chosen = {"event": "lr", "family": family, "candidate": entry["id"], "scores": scores}
        events.append({**chosen, "lr": 6e-3})
    tried = {e["candidate"] for e in events if e["event"] == "trial"}
    for entry in entries:
        if entry["id"] == broken:
            events.append(trial(entry, "0", None, RUNGS[0], failure=reason))
        elif entry["id"] not in tried:
            events.append(trial(entry, "0", first[entry["id"]], RUNGS[0]))
    ranked = sorted((e for e in entries if e["id"] != broken), key=lambda e: first[e["id"]])
    kept = [e for e in ranked if e["group"] != "outside"][:5]
    events += [trial(e, "1", first[e["id"]] - 0.5, RUNGS[1]) for e in kept]
    winner = next(e for e in kept if e["group"] != "preset")
    preset = next(e for e in kept if e["group"] == "preset")
    finals = {}
    for entry, score in ((winner, 2.3), (preset, 2.3 + gap)):
        finals[entry["id"]] = [
            trial(entry, "final", score + 0.02 * s, FINAL_TOKENS, seed=s, horizon=FINAL_TOKENS)
            for s in range(final_seeds)
        ]
        events += finals[entry["id"]]
    ranking = list(dict.fromkeys(e["id"] for e in [*kept, *ranked]))
    result = {"event": "result", "winner": winner["id"], "preset": preset["id"]}
    for key, entry in (("winner_trials", winner), ("preset_trials", preset)):
        result[key] = [t["id"] for t in finals[entry["id"]]]
    return [*events, {**result, "ranking": ranking}]


CASES = {
    "empty": [],
    "begun": [study()],
    "sampled": complete_events()[:15],
    "first trial": complete_events()[:16],
    "half-done": complete_events()[:40],
    "before the result": complete_events()[:-1],
    "complete": complete_events(),
    "failures": complete_events(failures=True),
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
    assert len(page.figures) == 6
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
    assert not [f for f in page.figures if "missing" in classes(f)]
    curves, scatter, params, state = page.figures[2:]
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
    assert {t["lr"] for s in summary.standings for t in s.trials} == {6e-3}
    assert swept.score("0") == pytest.approx(summary.sweeps[0]["scores"]["0.006"])
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
    worth = summary.worth
    assert (worth.everywhere.n, worth.in_band.n) == (12, 10)  # no presets; 2 outside the band
    assert "the proxy beats a random ranking" in " ".join(findings(summary))
    failed = summary_of("failures").worth
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
        (3, 0.03, "Their seeds overlap"),
        (1, 0.1, "The winner is ahead by 0.100 bits/byte; a single seed"),
        (1, -0.1, "The winner is behind by 0.100 bits/byte; a single seed"),
    ],
)
def test_winner_against_preset(seeds, gap, said):
    summary = summarise(complete_events(seeds, gap))
    assert said in " ".join(findings(summary))
    assert (summary.winner.spread is None) == (seeds == 1)


def test_a_winner_behind_a_baseline_is_named():
    begun, *rest = CASES["complete"]
    weak = [{**begun, "baselines": {"unigram": 4.7, "xz": 2.3}}, *rest]
    assert "the winner needs 2.320, more than xz" in " ".join(findings(summarise(weak)))
    assert "less than every one of them" in " ".join(findings(summary_of("complete")))


def test_failures_keep_their_reasons():
    summary = summary_of("failures")
    reasons = [reason for _, _, reason in summary.failures]
    assert "diverged: 14 nats at step 30; lower the lr" in reasons
    assert summary.standings[-1].rank is None
    assert table(summary).splitlines()[15].split()[-3] == "failed"
    assert "diverged: 14 nats" in markdown(summary)
    assert "<summary>last</summary>" in html(summary)  # the last line of a traceback
    assert 'class="cross proxy"' in html(summary)


def test_a_score_that_was_not_finite_is_a_failure_with_that_reason(tmp_path):
    entry = candidate(2, "proxy", "mamba", 200_000, 0.5)
    lost = {**trial(entry, "0", 3.0, RUNGS[0]), "bits_per_byte": math.nan}
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


@pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="no /usr/bin/chromium to render the page")
def test_chromium_renders_without_console_errors(tmp_path):
    write_report(tmp_path, CASES["hostile"])
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
        "--disable-background-networking --disable-component-update --disable-sync "
        "--enable-logging=stderr --log-level=0 --window-size=1240,2400"
    )
    picture = tmp_path / "page.png"
    done = subprocess.run(
        [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
        + [f"--screenshot={picture}", (tmp_path / "report.html").as_uri()],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
        check=False,
    )
    assert picture.stat().st_size > 50_000, done.stderr[-2000:]  # a blank page takes a tenth
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
