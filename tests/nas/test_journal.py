"""The journal: nothing acknowledged is ever lost, one writer, and seeds that time cannot touch."""

import errno
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kizzasi.errors import StudyError
from kizzasi.nas.study import journal as storage
from kizzasi.nas.study.journal import Journal, read_events

ROOT = Path(__file__).parents[2]
EVENTS = [{"event": "trial", "index": i, "loss": 0.1 + i / 3, "name": "é\n" * i} for i in range(4)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "journal.jsonl"


@pytest.fixture
def written(path):
    with Journal(path) as journal:
        for event in EVENTS:
            journal.append(event)
    return path


def test_what_is_appended_is_read_back_to_the_last_digit(written):
    assert read_events(written) == EVENTS
    with Journal(written) as journal:
        assert journal.events == EVENTS
        assert journal.torn == b""
        assert journal.append({"pair": (1, 2)}) == {"pair": [1, 2]}
    lines = written.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [*EVENTS, {"pair": [1, 2]}]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
events = st.dictionaries(st.text().filter(lambda key: key != "non_finite"), json_values)


@given(batch=st.lists(events, min_size=1, max_size=8))
@settings(max_examples=25, deadline=None)
def test_append_returns_what_readers_get_and_lines_are_strict_json(tmp_path_factory, batch):
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    with Journal(path) as journal:
        seen = [journal.append(event) for event in batch]

    def refuse(constant):
        raise AssertionError(constant)

    lines = path.read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse) for line in lines] == seen
    assert read_events(path) == seen
    for event, read_back in zip(batch, seen, strict=True):
        assert read_back == event or "non_finite" in read_back


def test_a_float_that_json_lacks_is_null_and_named(path):
    event = {"loss": math.nan, "curve": [1.5, math.inf], "by": {"xz": -math.inf}, "tokens": 7}
    with Journal(path) as journal:
        seen = journal.append(event)
    assert seen == {
        "loss": None,
        "curve": [1.5, None],
        "by": {"xz": None},
        "tokens": 7,
        "non_finite": {"loss": "nan", "curve.1": "inf", "by.xz": "-inf"},
    }


@given(cut=st.integers(0, 400))
@settings(max_examples=25, deadline=None)
def test_cut_anywhere_only_the_torn_line_is_gone(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    with Journal(path) as journal:
        for event in EVENTS:
            journal.append(event)
    content = path.read_bytes()[:cut]
    path.write_bytes(content)
    n_complete = content.count(b"\n")
    assert read_events(path) == EVENTS[:n_complete]
    with Journal(path) as journal:
        assert journal.events == EVENTS[:n_complete]
        assert journal.torn == content.rpartition(b"\n")[2]
        journal.append({"event": "resumed"})
    assert read_events(path) == [*EVENTS[:n_complete], {"event": "resumed"}]


@pytest.mark.parametrize("garbage", [b'{"half": ', b"\0" * 600, b'{"loss": NaN}\n', b"\xff\xfe\n"])
def test_a_damaged_last_line_is_reported_and_cut(written, garbage):
    with written.open("ab") as file:
        file.write(garbage)
    assert read_events(written) == EVENTS
    with Journal(written) as journal:
        assert journal.torn == garbage
    assert read_events(written) == EVENTS


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"loss": Infinity}', b"\0\0", b"\xff"])
def test_a_damaged_earlier_line_is_an_error_with_its_number(written, damage):
    lines = written.read_bytes().split(b"\n")
    content = b"\n".join([*lines[:2], damage, *lines[3:]])
    written.write_bytes(content)
    for use in (read_events, Journal):
        with pytest.raises(StudyError, match=r"journal\.jsonl, line 3: damaged"):
            use(written)
    assert written.read_bytes() == content


def test_one_writer_at_a_time_and_many_readers(written):
    with Journal(written) as journal:
        with pytest.raises(StudyError, match="another process is writing this run"):
            Journal(written)
        assert read_events(written) == EVENTS
        journal.append({"still": "open"})
    Journal(written).close()
    with pytest.raises(StudyError, match="this journal is closed"):
        journal.append({})
    assert sorted(p.name for p in written.parent.iterdir()) == ["journal.jsonl"]


def test_readers_see_whole_events_in_order_while_one_writes(path):
    n_events, counts = 300, []
    with Journal(path) as journal:

        def write():
            for i in range(n_events):
                journal.append({"i": i, "pad": "x" * (i * 37 % 5000)})

        writer = threading.Thread(target=write)
        writer.start()
        while writer.is_alive():
            seen = [event["i"] for event in read_events(path)]
            assert seen == list(range(len(seen)))
            counts.append(len(seen))
        writer.join()
    assert counts == sorted(counts)
    assert len(read_events(path)) == n_events


@pytest.mark.parametrize(
    ("place", "reason"),
    [("a file/journal.jsonl", ""), ("a folder", "directory"), ("/proc/none/journal.jsonl", "")],
)
def test_an_unwritable_place_names_the_path_and_the_remedy(tmp_path, place, reason):
    (tmp_path / "a file").touch()
    (tmp_path / "a folder").mkdir()
    with pytest.raises(StudyError, match=f"cannot write the journal: .*{reason}.*choose another"):
        Journal(tmp_path / place)
    with pytest.raises(StudyError, match="cannot read the journal"):
        read_events(tmp_path / place)


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_full_disk_in_mid_line_leaves_earlier_lines_and_recovers(written):
    """A file size limit makes the kernel take part of the line first, as a full disk does."""
    import resource

    size = written.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(written) as journal:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))
        try:
            with pytest.raises(StudyError, match=r"journal\.jsonl: .* free some space"):
                journal.append({"pad": "x" * 1000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert written.stat().st_size == size
        journal.append({"space": "freed"})
    assert read_events(written) == [*EVENTS, {"space": "freed"}]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_line_that_was_never_acknowledged_is_taken_back(written, monkeypatch, failure):
    def fail(_descriptor):
        raise failure

    with Journal(written) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises((StudyError, KeyboardInterrupt)):
                journal.append({"never": "acknowledged"})
        assert read_events(written) == EVENTS
        journal.append({"next": 1})
    assert read_events(written) == [*EVENTS, {"next": 1}]


def test_an_event_without_json_form_writes_nothing(written):
    with Journal(written) as journal:
        with pytest.raises(TypeError):
            journal.append({"loss": object()})
        with pytest.raises(AssertionError):
            journal.append({"non_finite": {}})
    assert read_events(written) == EVENTS


KILLED_WRITERS = """
import os, random, signal, sys, time
from kizzasi.nas.study.journal import Journal, read_events

path, n_before, random = sys.argv[1], 0, random.Random(0)
for kill in range(20):
    acknowledged, acknowledge = os.pipe()
    writer = os.fork()
    if writer == 0:
        journal = Journal(path)
        for i in range(len(journal.events), 10**9):
            journal.append({"i": i, "pad": "x" * random.choice([10, 1000, 200_000])})
            os.write(acknowledge, b".")
    os.close(acknowledge)
    n_acknowledged = len(os.read(acknowledged, 1))
    time.sleep(random.uniform(0, 0.03))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    n_acknowledged += len(os.read(acknowledged, 10**6))
    os.close(acknowledged)
    events = read_events(path)
    assert [event["i"] for event in events] == list(range(len(events)))
    assert len(events) - n_before in (n_acknowledged, n_acknowledged + 1)
    n_before = len(events)

ready, tell = os.pipe()
parent = os.fork()
if parent == 0:
    journal = Journal(path)
    orphan = os.fork()
    if orphan == 0:
        os.write(tell, b"%d" % os.getpid())
    time.sleep(60)
orphan = int(os.read(ready, 20))
os.kill(parent, signal.SIGKILL)
os.waitpid(parent, 0)
os.kill(orphan, 0)
with Journal(path) as journal:
    journal.append({"i": n_before})
os.kill(orphan, signal.SIGKILL)
print(n_before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 and fork are POSIX")
def test_kill_9_at_random_moments_loses_nothing_and_never_leaves_a_lock(tmp_path):
    """20 writers killed in mid-work; then one killed while a forked worker of it lives on."""
    run = subprocess.run(
        [sys.executable, "-c", KILLED_WRITERS, str(tmp_path / "journal.jsonl")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 20


def test_ten_thousand_appends_cost_little_beside_the_disk(path, monkeypatch):
    """The study's budget is 2 ms a trial; fsync is the disk's own and is left out here."""
    monkeypatch.setattr(storage.os, "fsync", lambda _descriptor: None)
    event = {"event": "finished", "trial": "0" * 16, "curve": [i / 7 for i in range(20)]}
    start = time.perf_counter()
    with Journal(path) as journal:
        for i in range(10_000):
            journal.append({**event, "index": i})
    assert (time.perf_counter() - start) / 10_000 < 1e-3  # 30 µs on an idle core
    start = time.perf_counter()
    assert len(read_events(path)) == 10_000
    assert time.perf_counter() - start < 5


def test_a_journal_of_version_0_1_is_read_as_one_of_today(path):
    """It knew bits per byte, one setting, and text."""
    old = [
        {"event": "study", "config": {}, "corpus": {"name": "text"}, "baselines": {}},
        {"event": "lr", "family": "mamba", "scores": {"0.004": 2.5, "0.008": None}, "lr": 0.004},
        {"event": "trial", "id": "a-1", "lr": 0.004, "bits_per_byte": 2.5},
        {"event": "trial", "id": "b-1", "lr": 0.008, "bits_per_byte": float("nan")},
    ]
    with Journal(path) as journal:
        for event in old:
            journal.append(event)
    study, settings, trial, lost = read_events(path)
    assert (study["data"], study["metric"]) == ({"name": "text"}, {"name": "bits/byte"})
    assert settings["event"] == "settings"
    assert settings["scores"] == {"lr 0.004": 2.5, "lr 0.008": None}
    assert settings["settings"] == trial["settings"] == {"lr": 0.004}
    assert trial["score"] == 2.5
    assert (lost["score"], lost["non_finite"]["score"]) == (None, "nan")
    with Journal(path) as journal:
        assert journal.events == [study, settings, trial, lost]


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def none(descriptor):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(storage, "lock", none)
    with pytest.raises(StudyError, match=r"cannot lock a file \(No locks available\); put the run"):
        Journal(tmp_path / "journal.jsonl")
