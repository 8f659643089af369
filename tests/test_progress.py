"""What a person sees while a program runs: phases, the best so far and the time left on a terminal,
a line a minute in a log, and in the end a verdict, a sample and what to type next."""

import fcntl
import io
import json
import os
import re
import struct
import termios
import time
from pathlib import Path

import pytest

from kizzasi.cli import main
from kizzasi.models import BlockSpec, ModelSpec, Tokens, load
from kizzasi.models.mixers import AttentionSpec
from kizzasi.nas.report.live import Live
from kizzasi.nas.report.pages import summarise
from kizzasi.nas.report.sentences import verdict
from kizzasi.nas.study.journal import read_events
from kizzasi.progress import CLEAR, EVERY_SECONDS, Line
from kizzasi.train.task import Metric
from kizzasi.train.trainer import Training

pty = pytest.importorskip("pty")
SHAPE = ["--seq-len", 16, "--batch-size", 2]
SEARCH = ["search", "--data", "text", "--space", "space.json", "--out", "found", "--workers", 1]
SEARCH += ["--searcher", "random", "--params", 8000, "--band", 0.6, "--candidates", 2, *SHAPE]
SEARCH += ["--scheduler", "halving", "--rungs", 64, 128, "--tokens", 192, "--final-seeds", 1]
SEARCH += ["--score-windows", 4, "--proxies", "--lrs", 3e-3]
TRAIN = ["train", "spec.yaml", "--data", "text", "--out", "run", "--steps", 12, *SHAPE]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    ModelSpec(8, (BlockSpec(AttentionSpec(n_heads=2)),), Tokens(256)).to_file("spec.yaml")
    block = {"mixer": {"kind": "attention", "n_heads": {"choice": [1, 2]}}}
    space = {"d_model": 16, "stem": {"kind": "tokens", "vocab_size": 256}, "tie_head": True}
    space["blocks"] = {"repeat": block, "low": 1, "high": 2}
    Path("space.json").write_text(json.dumps(space))
    Path("text").write_text("".join(f"line {i * i % 997} of a small text\n" for i in range(300)))
    return tmp_path


class Terminal:
    """A terminal of some width; `read` gives what was written there so far."""

    def __init__(self, columns: int) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.set_blocking(self.master, False)
        self.stream = os.fdopen(slave, "w")
        self.seen = b""

    def read(self) -> str:
        self.stream.flush()
        while True:
            try:
                self.seen += os.read(self.master, 2**16)
            except BlockingIOError:
                return self.seen.decode()

    def close(self) -> None:
        self.stream.close()
        os.close(self.master)


@pytest.fixture
def terminal():
    made = Terminal(100)
    yield made
    made.close()


def on_terminal(monkeypatch, terminal: Terminal, *words) -> str:
    """What is written to a terminal on stderr; its room for unread text is small, so read often."""
    real = Line.say

    def say(self, text, **options):
        real(self, text, **options)
        terminal.read()

    monkeypatch.setattr(Line, "say", say)
    monkeypatch.setattr("sys.stderr", terminal.stream)
    assert main([str(word) for word in words]) == 0
    return terminal.read()


def last_shown(text: str) -> str:
    """What is left on the line after all that was written there."""
    return re.split(r"\r|\x1b\[K", text)[-1].strip()


def test_a_search_names_its_phases_and_ends_with_what_to_do(monkeypatch, place, terminal, capsys):
    seen = on_terminal(monkeypatch, terminal, *SEARCH)
    phases = ["search: starting", "reading the data", "baselines", "proxies", "rung 1 of 2"]
    phases += ["rung 2 of 2", "final trainings", "saving"]
    at = [seen.index(phase) for phase in phases]
    assert at == sorted(at)
    assert re.search(r"rung 2 of 2, \d+ trials, best \d\.\d{3} bits/byte \(", seen)
    assert re.search(r"\d+%\|.*\| at most \d\d:\d\d left", seen)
    assert last_shown(seen) == ""
    told = capsys.readouterr().out
    events = read_events(Path("found/journal.jsonl"))
    assert " ".join(verdict(summarise(events)).split()) in " ".join(told.split())
    assert told.count("The best searched model is ") == 1
    sample = next(e for e in events if e["event"] == "sample")
    assert "it writes:\n  " in told
    for command in ("generate", "export", "report"):
        assert f"  kizzasi {command} found" in told
    # the sample is what `generate` writes with the same seed, and stands in both reports
    assert main(["generate", "found", "--seed", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "\n" + sample["text"]
    assert "## Sample" in Path("found/report.md").read_text()
    assert '<pre class="sample">' in Path("found/report.html").read_text()
    before = Path("found/journal.jsonl").read_bytes()
    assert main(["search", "--resume", "--out", "found", "--workers", "1"]) == 0
    assert Path("found/journal.jsonl").read_bytes() == before  # nothing is written twice
    assert load("found/best").n_params > 0


def test_a_training_shows_its_loss_on_a_terminal(monkeypatch, place, terminal):
    real = Training._step

    def slower(self, *batch):  # a line is shown ten times a second at most
        time.sleep(0.11 if self.step >= 9 else 0.0)
        return real(self, *batch)

    monkeypatch.setattr(Training, "_step", slower)
    seen = on_terminal(monkeypatch, terminal, *TRAIN)
    assert re.search(r"train +\d+%\|.*\| \d\d:\d\d left, step 1\d, loss \d\.\d{3} bits/byte", seen)
    assert "scoring" in seen
    assert last_shown(seen) == ""
    assert "\x1b" not in seen.replace(CLEAR.strip("\r"), "")


def test_the_first_word_comes_before_slow_imports_and_none_where_nobody_looks(
    monkeypatch, place, terminal
):
    seen = []

    def parse(given):
        seen.append(terminal.read())
        raise KeyboardInterrupt

    monkeypatch.setattr("kizzasi.cli.parse", parse)
    monkeypatch.setattr("sys.stderr", terminal.stream)
    assert main(["search"]) == 130
    assert main(["search", "--help"]) == 130
    first, second = seen
    assert first == "kizzasi search: starting"
    assert second.count("starting") == 1
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    main(["search"])
    assert log.getvalue() == "\nkizzasi search: stopped\n"


@pytest.mark.parametrize(("size", "wide"), [((24, 40), 40), ((0, 0), 80)])
def test_no_redrawn_line_is_wider_than_its_terminal(monkeypatch, terminal, size, wide):
    """Also where it does not say how large it is, as in some containers."""
    fcntl.ioctl(terminal.stream, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    monkeypatch.setattr("sys.stderr", terminal.stream)
    with Line("search", 100) as line:
        line.say("a name that is much longer than forty columns can ever hold")
        line.update(50)
        line.write("stays")
    seen = terminal.read()
    assert "50%" in seen or "0%" in seen
    assert ", a n" in seen
    assert ("|" in seen) == (wide == 80)  # a narrow one has words instead of a bar
    assert max(len(part) for part in re.split(r"[\r\n]+", seen)) <= wide
    assert "stays\r\n" in seen


def test_a_log_has_one_line_a_minute():
    now, log = [0.0], io.StringIO()
    with Line("train", 1000, stream=log, at_most=True, clock=lambda: now[0]) as line:
        for step in range(500):
            line.say(f"step {step}")
            line.update(1)
            now[0] += 1.0
    lines = log.getvalue().splitlines()
    assert len(lines) == 9  # at once, and after 60, 120, ..., 480 seconds
    assert lines[0].startswith("train: step 0, 1.00 tok of at most 1.00k")
    assert lines[5] == "train: step 300, 301 tok of at most 1.00k, at most 11:39 left"
    assert EVERY_SECONDS == 60
    hidden = io.StringIO()
    with Line("train", 1000, stream=hidden, hidden=True) as line:
        line.update(1)
    assert hidden.getvalue() == ""


def test_the_time_left_is_told_once_the_pace_of_the_work_is_known():
    """A minute of starting processes, once taken for the pace of a step, promised hours."""
    now, log = [0.0], io.StringIO()
    with Line("search", 100_000, stream=log, clock=lambda: now[0]) as line:

        def told(seconds, tokens):
            now[0] += seconds
            line.last = float("-inf")
            line.update(tokens)
            return log.getvalue().splitlines()[-1]

        assert told(60, 100) == "search, 100 tok of 100k"
        assert told(1, 100) == "search, 200 tok of 100k", "one step more is no pace yet"
        assert told(9, 500) == "search, 700 tok of 100k, 27:35 left"
        assert told(0.0, 99_300) == "search, 100k tok of 100k, 00:00 left"
        assert told(1.0, 1) == "search, 100k tok of 100k", "more than was announced"
        line.count_to(1000)
        assert told(60, 10) == "search, 10.0 tok of 1.00k"
        assert told(1, 10) == "search, 20.0 tok of 1.00k, 01:38 left", "a hundredth is enough"


def test_a_terminal_is_promised_no_time_before_a_log_is(terminal, monkeypatch):
    now = [0.0]
    with Line("search", 1000, stream=terminal.stream, clock=lambda: now[0]) as line:
        line.say("proxies")
        now[0] = 60.0
        line.update(1)
        line.say("rung 1")
        assert "left" not in terminal.read()
        now[0] = 80.0
        line.update(19)
        line.say("rung 2")
        assert "| 17:11 left, rung 2" in terminal.read()
        assert "|, proxies" in terminal.read()


def test_a_resumed_count_reckons_with_what_it_gained_itself():
    now, log = [0.0], io.StringIO()
    with Line("train", 1000, done=900, stream=log, clock=lambda: now[0]) as line:
        line.update(0)
        now[0], line.last = 10.0, float("-inf")
        line.update(10)
    assert log.getvalue().splitlines()[-1] == "train, 910 tok of 1.00k, 01:30 left"


def test_what_a_search_is_at():
    live = Live(Metric("accuracy", lower_is_better=False), 3)
    assert live.text == "baselines"
    live.tell({"event": "candidate", "id": "a", "name": "A"})
    assert live.text == "proxies"

    def trial(rung, score, candidate="a"):
        rate = {"seconds": 2.0, "tokens_per_second": 50.0}
        live.tell({"event": "trial", "rung": rung, "score": score, "candidate": candidate, **rate})
        return live.text

    live.tell({"event": "candidate", "id": "b", "name": "B"})
    assert trial("0", 0.5) == "rung 1 of 3, 1 trial, best 0.500 accuracy (A)"
    assert trial("0", 0.75, "b") == "rung 1 of 3, 2 trials, best 0.750 accuracy (B)"
    assert trial("1", 0.25) == "rung 2 of 3, 3 trials, best 0.250 accuracy (A)"  # deeper counts
    assert trial("0", None) == "rung 2 of 3, 4 trials (1 failed), best 0.250 accuracy (A)"
    assert trial("final", 0.6, "b").startswith("final trainings, 5 trials (1 failed), best 0.600")
    assert trial("narrow", 0.9, "b").endswith("best 0.600 accuracy (B)")
    assert live.tokens == 600
