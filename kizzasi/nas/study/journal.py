"""The memory of a search: an append-only journal that survives kill -9.

Glossary
    event       one JSON object: what happened to the run or to one trial
    line        an event with its newline; only a line with its newline is complete
    torn        what a crash left of a last line that was never acknowledged
"""

import errno
import json
import math
import os
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from kizzasi.errors import StudyError
from kizzasi.files import NO_ROOM, BusyError, lock, read_bytes
from kizzasi.nas.results.events import check_events

Event = dict[str, Any]
MOST_BYTES = 2**30
PIECE_BYTES, LINE_BYTES = 2**18, 2**12  # read at once, of many lines and of one
BEGINNING = b'{"event":"'


class Journal:
    """The one writer of an append-only file of JSON lines.

    When `append` returns, the event is on the disk: a crash at any moment loses no line that was
    acknowledged, and at most leaves a torn one, which the next Journal shows in `torn` and its
    first `append` cuts off. When `append` raises, the file is as it was before. One writer at a
    time: the lock is the kernel's, so it goes with the process, even by kill -9, and there is no
    lock file. A file that does not begin as a journal does is another program's and is left alone.

    Args:
        path: the file; it and its folder are created when missing.

    Attributes:
        torn: bytes of a torn last line; empty after a clean end.

    Raises:
        StudyError: another process is writing the journal, a line before the last is damaged, the
            file is a link or no journal, or the place cannot be written; names the path and the
            way out.
    """

    torn: bytes

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_symlink():
            raise StudyError(f"{self.path}: a link; a journal is a file of the run itself")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists() or self.path.is_dir() or self.path.is_file():
                self._file = FileIO(self.path, "a+", opener=_open)
            else:
                raise OSError(errno.EINVAL, "not a regular file")
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        try:
            _lock(self._file, self.path)
            self._recover()
        except BaseException:
            self._file.close()
            raise
        _open_journals.add(self)

    def _recover(self) -> None:
        """Look at what is there. Nothing is cut yet: who opened it may find that it is not
        theirs."""
        try:
            end = self._file.seek(0, os.SEEK_END)
            ends = (after for _, _, after in _parsed(self._lines(end), self.path))
            self._size = max(ends, default=0)
            self.torn = self._read(self._size, end - self._size)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self._new = self._size == 0
        if self._new and not BEGINNING.startswith(self.torn[: len(BEGINNING)]):
            raise StudyError(
                f"{self.path}: holds {len(self.torn)} bytes that are no journal; move the file "
                "away or choose another run folder"
            )

    @property
    def events(self) -> list[Event]:
        """Every event, read from the file."""
        return [event for _, event in self.scan()]

    @property
    def size(self) -> int:
        """Bytes of all complete lines: the place of the next one."""
        return self._size

    def scan(self, kind: str | None = None) -> Iterator[tuple[int, Event]]:
        """Place and event of every line that is there now, one after the other from the file.

        Args:
            kind: of the events that are wanted; the other lines are passed over quickly.
        """
        beginning, place = b"" if kind is None else BEGINNING + kind.encode() + b'"', 0
        for line, _ in self._lines(self._size):
            if line.startswith(beginning) and line:
                yield place, upgraded(_DECODER.decode(line.decode()))
            place += len(line) + 1

    def at(self, place: int) -> Event:
        """The event at a place that `scan` or `size` has given."""
        line = b""
        while not line.endswith(b"\n"):
            line = self._read(place, max(2 * len(line), LINE_BYTES)).partition(b"\n")
            line = line[0] + line[1]
        return upgraded(_DECODER.decode(line.decode()))

    def _read(self, place: int, n: int) -> bytes:
        self._file.seek(place)
        return self._file.read(min(n, MOST_BYTES))

    def _lines(self, end: int) -> Iterator[tuple[bytes, bool]]:
        """Every line before `end`, and whether it is complete; the last one is not."""
        place, rest = 0, b""
        while place < end:
            piece = self._read(place, min(PIECE_BYTES, end - place))
            if not piece:
                break
            place += len(piece)
            *lines, rest = (rest + piece).split(b"\n")
            yield from ((line, True) for line in lines)
        yield rest, False

    def append(self, event: Mapping[str, Any]) -> Event:
        """Write one event and wait until the disk has it.

        JSON has no NaN and no infinity: such a float is written as null, and the top-level key
        `non_finite` maps its place to what it was, as in {"loss": null, "non_finite":
        {"loss": "nan"}}. Every other float comes back to the last digit.

        Args:
            event: JSON types with string keys; tuples become lists.

        Returns:
            The event as every reader will see it. Work with this one, so that a run and its
            resumption see the same.

        Raises:
            StudyError: the disk is full or gone, or the journal is closed.
            TypeError: a value has no JSON form; nothing was written.
        """
        if self._file.closed:
            raise StudyError(f"{self.path}: this journal is closed; open it again to append")
        line = _encode(event)
        try:
            if os.fstat(self._file.fileno()).st_size > self._size:
                self._file.truncate(self._size)  # a torn line
            _write_all(self._file, line)
            os.fsync(self._file.fileno())
            self._size += len(line)
            if self._new:
                _sync_folder(self.path.parent)
                self._new = False
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        finally:
            # Also after Ctrl-C in mid-write: the next event must not be glued to half a line.
            if os.fstat(self._file.fileno()).st_size > self._size:
                self._file.truncate(self._size)
        return _DECODER.decode(line.decode())

    def clear(self) -> None:
        """Forget every event: what the folder will hold is another search's."""
        try:
            self._file.truncate(0)
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self.torn, self._size, self._new = b"", 0, True

    def close(self) -> None:
        """Give up the lock."""
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_events(path: str | Path) -> list[Event]:
    """Every complete event of a journal, in order, also while another process is writing it.

    Raises:
        StudyError: no journal there, unreadable, or a line before the last is damaged.
    """
    path = Path(path)
    try:
        content = read_bytes(path, MOST_BYTES)
    except OSError as error:
        raise StudyError(
            f"{path}: cannot read the journal: {error.strerror}; give the folder of a run"
        ) from error
    *lines, tail = content.split(b"\n")
    lines = [*((line, True) for line in lines), (tail, False)]
    return [upgraded(event) for _, event, _ in _parsed(lines, path)]


def read_run(path: str | Path) -> list[Event]:
    """The events of a search, each looked at field by field.

    Raises:
        StudyError: as `read_events`, or an event is not what its kind is made of; names the line.
    """
    return check_events(read_events(path), path)


def upgraded(event: Event) -> Event:
    """An event of version 0.1, which knew bits per byte and one setting, as one of today."""
    event = dict(event)
    lost = event.get("non_finite", {})
    if not isinstance(lost, Mapping):
        return event
    if "bits_per_byte" in event:
        event["score"] = event.pop("bits_per_byte")
    if "bits_per_byte" in lost:
        event["non_finite"] = {"score": lost["bits_per_byte"], **lost}
    if event.get("event") == "lr" and isinstance(event.get("scores"), Mapping):
        named = {f"lr {rate}": score for rate, score in event["scores"].items()}
        event |= {"event": "settings", "scores": named, "settings": {"lr": event.pop("lr", None)}}
    if event.get("event") == "trial" and "lr" in event:
        event["settings"] = {"lr": event.pop("lr")}
    if event.get("event") == "study" and "corpus" in event:
        event["data"] = event.pop("corpus")
        event["metric"] = {"name": "bits/byte"}
    return event


def _parsed(lines: Iterable[tuple[bytes, bool]], path: Path) -> Iterator[tuple[int, Event, int]]:
    """Place, event and end of every complete line. A damaged last one counts as torn."""
    place, fault = 0, None
    for number, (line, complete) in enumerate(lines, start=1):
        if fault is not None and (complete or line):
            raise fault from fault.__cause__
        if fault is not None or not complete:
            return
        try:
            event = _DECODER.decode(line.decode())
            if not isinstance(event, dict):
                raise ValueError("not a JSON object")
        except (ValueError, RecursionError) as error:
            fault = StudyError(
                f"{path}, line {number}: damaged ({error}); repair or delete that line, "
                "the others are intact"
            )
            fault.__cause__ = error
            continue
        yield place, event, place + len(line) + 1
        place += len(line) + 1


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


def _encode(event: Mapping[str, Any]) -> bytes:
    assert "non_finite" not in event, "non_finite is the journal's own key"
    try:
        text = _ENCODER.encode(event)
    except ValueError:
        found: dict[str, str] = {}
        finite = _without_non_finite(event, "", found)
        text = _ENCODER.encode({**finite, "non_finite": found})
    return text.encode() + b"\n"


def _without_non_finite(value: Any, place: str, found: dict[str, str]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        found[place.lstrip(".")] = repr(float(value))
        return None
    if isinstance(value, Mapping):
        return {k: _without_non_finite(v, f"{place}.{k}", found) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_non_finite(v, f"{place}.{i}", found) for i, v in enumerate(value)]
    return value


def _write_all(file: FileIO, line: bytes) -> None:
    """A nearly full disk takes part of a line first and only then reports that it is full."""
    written = 0
    while written < len(line):
        written += file.write(line[written:])


def _cannot_write(path: Path, error: OSError) -> StudyError:
    remedy = (
        "free some space"
        if error.errno in NO_ROOM
        else "make the folder writable or choose another"
    )
    return StudyError(
        f"{path}: cannot write the journal: {error.strerror}; {remedy}, then resume; "
        "what was written before is intact"
    )


_open_journals: "weakref.WeakSet[Journal]" = weakref.WeakSet()

if sys.platform == "win32":

    def _sync_folder(folder: Path) -> None:
        """NTFS keeps a journal of its folders itself."""

else:

    def _close_inherited() -> None:
        for journal in _open_journals:
            journal.close()

    # A forked worker inherits the descriptor and with it the lock. Were it to outlive its killed
    # parent, the run would stay locked, so it lets go at birth.
    os.register_at_fork(after_in_child=_close_inherited)

    def _sync_folder(folder: Path) -> None:
        """A new file is safe only when the folder that names it is."""
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _lock(file: FileIO, path: Path) -> None:
    try:
        lock(file.fileno())
    except BusyError as error:
        raise _locked(path) from error
    except OSError as error:
        raise StudyError(
            f"{path}: this file system cannot lock a file ({error.strerror}); "
            "put the run on a local disk"
        ) from error


def _locked(path: Path) -> StudyError:
    return StudyError(
        f"{path}: another process is writing this run; wait for it or stop it, "
        "or choose another run folder"
    )
