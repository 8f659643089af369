"""A run that goes on: its report is written anew, its state fits a screen, Ctrl-C ends the look."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from made_up_runs import HOSTILE, complete_events, evolved_events, study, trial

from kizzasi.cli import main
from kizzasi.errors import StudyError
from kizzasi.files import is_held
from kizzasi.nas.report.status import Pace, pace_of, status, tokens_left
from kizzasi.nas.results.summary import summarise
from kizzasi.nas.study.journal import Journal

PLANNED = {"rungs": [32_768, 98_304], "keep": 0.34, "final_tokens": 262_144, "final_seeds": 3}


def planned(events):
    """The same run by a search whose config says how far it goes."""
    begun, *rest = events
    return [{**begun, "config": {**begun["config"], **PLANNED}}, *rest]


def write(folder, events, torn=b""):
    with Journal(folder / "journal.jsonl") as journal:
        for event in events:
            journal.append(event)
    with open(folder / "journal.jsonl", "ab") as file:
        file.write(torn)
    return folder


@pytest.mark.parametrize("events", [[], [study()], complete_events()[:16], complete_events()])
def test_the_report_is_written_anew(tmp_path, capsys, events):
    run = write(tmp_path, events, torn=b'{"event":"trial","id":"x')
    assert main(["report", str(run)]) == 0
    text = capsys.readouterr().out
    assert "report.html" in text
    assert "</html>" in (run / "report.html").read_text("utf-8")
    assert (run / "report.md").read_text("utf-8").startswith("# Architecture search")
    assert main(["report", str(run), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["trials"] == sum(e["event"] == "trial" for e in events)
    assert said["finished"] == any(e["event"] == "result" for e in events)


def test_refusals(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "give the folder of a run" in capsys.readouterr().err
    write(tmp_path, [])
    assert main(["report", str(tmp_path), "--watch", "0"]) == 2
    assert "--watch 0: give a number of seconds above 0" in capsys.readouterr().err


def hostile_names():
    """Candidates whose names a terminal would obey."""
    events = complete_events()
    for event in events:
        if event["event"] == "candidate":
            event["name"] = f"\x1b[2J\x9b2J\0\n{event['name']}" + "x" * 90
    return events


@pytest.mark.parametrize("events", [hostile_names(), hostile_names()[:40]])
def test_no_name_reaches_a_terminal_or_page_as_it_is(tmp_path, capsys, events):
    run = write(tmp_path, events)
    assert main(["report", str(run)]) == 0
    shown = capsys.readouterr().out + status(summarise(events), pace_of(summarise(events)))
    for text in (shown, *((run / f"report.{kind}").read_text("utf-8") for kind in ("html", "md"))):
        assert all(c.isprintable() or c in "\n\t" for c in text)


@pytest.mark.parametrize(
    "events",
    [
        [],
        hostile_names(),
        complete_events(name=HOSTILE),
        evolved_events(),
        planned(complete_events()[:30]),
    ],
)
def test_the_state_fits_a_screen(events):
    summary = summarise(events)
    lines = status(summary, pace_of(summary)).split("\n")
    rungs = lines[lines.index("") + 2 :] if "" in lines else []
    assert all(line[-1].isdigit() for line in rungs)  # the last column, seconds, is all there
    assert len(lines) <= 24
    assert all(len(line) <= 100 and (line == "" or line.isprintable()) for line in lines)


def test_the_time_left_by_hand():
    events = planned(complete_events())
    for name in ("candidates, no trial", "after rung 0", "complete"):
        kept = [e for e in events if e["event"] in ("study", "candidate")]
        if name == "after rung 0":
            kept = [e for e in events if e.get("rung", "0") == "0" and e["event"] != "result"]
        if name == "complete":
            kept = events
        summary = summarise(kept)
        rung_0, rung_1, finals = 14 * 32_768, 6 * 65_536, 6 * 262_144
        wanted = {"candidates, no trial": rung_0 + rung_1 + finals, "after rung 0": rung_1 + finals}
        assert tokens_left(summary) == wanted.get(name, 0)
        begun, *rest = kept
        grows = {**begun, "config": {**begun["config"], "searcher": "evolution"}}
        bounded = {**grows, "config": {**grows["config"], "search_tokens": 10**7}}
        if name == "after rung 0":
            spent = pace_of(summary).tokens
            assert tokens_left(summarise([grows, *rest])) is None
            assert tokens_left(summarise([bounded, *rest])) == 10**7 - spent + finals
    running = summarise([e for e in events if e.get("rung", "0") == "0" and e["event"] != "result"])
    pace = Pace(seconds=100.0, tokens=1_000_000)
    left = (6 * 65_536 + 6 * 262_144) / 1e4
    assert f"about {left / 60:.0f} min of training" in status(running, pace)
    assert f"about {left / 2:.0f} s\n" in status(running, Pace(100.0, 1_000_000, 2.0))
    assert "left      not known" in status(summarise(complete_events()[:20]), pace)
    assert "left      nothing" in status(summarise(events), pace)


def test_what_stopped_is_told_from_what_goes_on_and_why_nothing_has_a_score(tmp_path, capsys):
    entry, begun = complete_events()[1], complete_events()[0]
    failed = [trial(entry, "0", None, 0, seed=s, failure="the loss became nan") for s in range(3)]
    run = write(tmp_path, [begun, entry, *failed])
    assert main(["report", str(run)]) == 0
    told = capsys.readouterr().out
    assert "search on topics: stopped" in told
    assert "left      kizzasi search --resume goes on with it" in told
    assert "failed    3: the loss became nan" in told
    with Journal(run / "journal.jsonl"):
        assert is_held(run / "journal.jsonl")
        assert main(["report", str(run)]) == 0
        assert "search on topics: going on" in capsys.readouterr().out
    assert not is_held(run / "journal.jsonl")
    assert is_held(run / "nothing")  # where nobody can say


def test_who_only_looks_keeps_no_writer_out(tmp_path):
    path = write(tmp_path, [study()]) / "journal.jsonl"
    with path.open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.01, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        Journal(path).close()
        fcntl.flock(looking, fcntl.LOCK_EX)
        with pytest.raises(StudyError, match="another process"):
            Journal(path)


def test_a_watch_ends_with_the_search(tmp_path, capsys):
    run = write(tmp_path, complete_events())
    assert main(["report", str(run), "--watch", "0.05"]) == 0
    text = capsys.readouterr().out
    assert "complete" in text
    assert "\x1b" not in text  # not a terminal


def test_ctrl_c_ends_a_watch_in_peace(tmp_path):
    events = complete_events()
    run = write(tmp_path, events[:20])
    command = [sys.executable, "-m", "kizzasi.cli", "report", str(run), "--watch", "0.05"]
    watch = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a background suite has none
    )
    assert watch.stdout is not None
    first = watch.stdout.readline()
    assert "stopped" in first
    with Journal(run / "journal.jsonl") as journal:  # the run goes on while it is watched
        for event in events[20:24]:
            journal.append(event)
        seen, deadline = "", time.monotonic() + 60
        while "going on" not in seen and time.monotonic() < deadline:
            seen = watch.stdout.readline()
        assert "going on" in seen
    while "7 done" not in seen and time.monotonic() < deadline:
        seen = watch.stdout.readline()
    assert "7 done" in seen
    watch.send_signal(signal.SIGINT)
    out, err = watch.communicate(timeout=60)
    assert watch.returncode == 0, err
    assert out.rstrip().endswith("report.html")
    assert "Traceback" not in err
