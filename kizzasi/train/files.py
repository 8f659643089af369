"""Files of text: which of a folder are read, which are left out, and why."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from kizzasi.errors import DataError
from kizzasi.files import open_regular, read_most
from kizzasi.train.memory import free_bytes

# Tests and installed packages; and two folders of tables and prose that mostly repeat themselves.
NOT_STANDARD_LIBRARY_CODE = frozenset(
    ["site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"]
)
COPIES = 4  # of a text, while it is read and split
OF_A_SEARCH = b'{"event":"study",'  # what a search's journal.jsonl begins with
# What is said of what is not read, of one and of several.
SAID = {
    "hidden": ("hidden file or folder not read", "hidden files and folders not read"),
    "of a run": ("folder of a search not read", "folders of searches not read"),
    "a link": ("link not followed", "links not followed"),
    "no regular file": ("pipe or device not read", "pipes and devices not read"),
    "binary": ("binary file not read", "binary files not read"),
    "no numbers": ("column without numbers left out", "columns without numbers left out"),
}
LOOKED_AT = 8192  # bytes of a file in which a zero byte says that it is no text


def language_reference() -> bytes:
    """The documentation that ships with CPython, each paragraph once."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError(
            "this Python came without pydoc_data.topics, the default text; "
            "pass --data FILE_OR_FOLDER"
        ) from error
    joined = "\n\n".join(topics[key] for key in sorted(topics))
    # Topics quote each other at length; dict keeps the first of equal paragraphs, in order.
    return "\n\n".join(dict.fromkeys(joined.split("\n\n"))).encode()


def standard_library() -> Iterator[Path]:
    """The standard library's own .py files."""
    files = files_of(Path(sysconfig.get_path("stdlib")), NOT_STANDARD_LIBRARY_CODE)
    return (path for path in files if path.suffix == ".py")


def files_of(
    root: Path,
    skipped: frozenset[str] = frozenset(),
    left_out: list[str] | None = None,
    apart: Path | None = None,
) -> Iterator[Path]:
    """The file itself, or every file of a folder that may be text: its own, then its folders'.

    Args:
        root: a file, which is taken as it is, or a folder.
        skipped: names of folders to pass by.
        left_out: is told of what is never read: hidden files and folders, links, pipes, and
            folders of searches.
        apart: a folder that a run writes into, so that it is no data of that run.

    Raises:
        DataError: nothing there, a folder that cannot be read, or `root` is `apart`.
    """
    told = left_out if left_out is not None else []
    if os.path.isfile(root):
        yield root
        return
    if not os.path.isdir(root):
        found = os.path.exists(root)
        rule = "is neither a file nor a folder" if found else "is not there, or out of reach"
        raise DataError(f"{root}: {rule}; pass --data FILE_OR_FOLDER")

    if apart is not None and apart.resolve() == root.resolve():
        raise DataError(f"{root}: data and output are one folder; choose another --out")

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}; make the folder readable or move it")

    for folder, folders, files in os.walk(root, onerror=refuse):
        hidden = sorted(name for name in (*folders, *files) if name.startswith("."))
        told += [f"{Path(folder, name).relative_to(root)}: hidden" for name in hidden]
        runs = sorted(name for name in folders if _is_run(Path(folder, name), apart))
        told += [f"{Path(folder, name).relative_to(root)}: of a run" for name in runs]
        folders[:] = sorted(set(folders) - skipped - set(hidden) - set(runs))
        links = (name for name in folders if Path(folder, name).is_symlink())  # not walked
        told += [f"{Path(folder, name).relative_to(root)}: a link" for name in links]
        for path in (Path(folder, file) for file in sorted(set(files) - set(hidden))):
            if path.is_symlink():
                told.append(f"{path.relative_to(root)}: a link")
            elif path.is_file():
                yield path
            else:
                told.append(f"{path.relative_to(root)}: no regular file")


def said_of(left_out: Sequence[str]) -> str:
    """What a program says of what it does not read: how much by reason, and the first of it.

    Args:
        left_out: "name: reason" each.
    """
    reasons = Counter(one.rpartition(": ")[2] for one in left_out)
    counts = [f"{n} {_words(reason, n)}" for reason, n in reasons.items()]
    first = ", ".join(one.rpartition(": ")[0] for one in left_out[:3])
    more = ", ..." if len(left_out) > 3 else ""
    return f"{', '.join(counts)} ({first}{more})"


def _words(reason: str, n: int) -> str:
    words = SAID.get(reason, (reason, reason))
    return words[n != 1]


def _is_run(folder: Path, apart: Path | None) -> bool:
    """Whether a search or training writes there."""
    if apart is not None and apart.resolve() == folder.resolve():
        return True
    try:
        with open_regular(folder / "journal.jsonl") as file:
            return file.read(len(OF_A_SEARCH)) == OF_A_SEARCH
    except OSError:
        return False


def read_files(
    paths: Iterator[Path], max_bytes: int | None, left_out: list[str] | None = None
) -> bytes:
    """Join the files, each once, and stop when there are enough bytes.

    Args:
        paths: in order; .gz files are unpacked.
        max_bytes: to stop at; None reads all.
        left_out: is told of files that are no text, which a folder may hold; None takes them too.

    Raises:
        DataError: a file cannot be read or unpacked, or all is more than memory has room for.
    """
    text, seen = bytearray(), set[bytes]()
    room = _room()
    for path in paths:
        most = room - len(text) if max_bytes is None else max_bytes - len(text)
        try:
            with path.open("rb") as raw:
                _require_room(path, raw, most if max_bytes is None else room)
                with gzip.open(raw) if path.suffix == ".gz" else raw as file:
                    piece = read_most(file, most + 1 if max_bytes is None else most)
            if max_bytes is None and len(piece) > most:
                raise _too_large(path, len(piece), room)
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise DataError(
                f"{path}: {reason}; make the file readable or move it out of the data"
            ) from error
        if left_out is not None and b"\0" in piece[:LOOKED_AT]:
            left_out.append(f"{path}: binary")
            continue
        key = hashlib.sha256(piece).digest()
        if key not in seen:
            seen.add(key)
            text += piece
        if len(text) == max_bytes:
            break
    return bytes(text)


def _room() -> int:
    """Bytes of text that the free memory has room for."""
    return free_bytes() // COPIES


def _require_room(path: Path, file: BinaryIO, most: int) -> None:
    size = os.fstat(file.fileno()).st_size
    if path.suffix != ".gz" and size > most:
        raise _too_large(path, size, most)


def _too_large(path: Path, size: int, most: int) -> DataError:
    return DataError(
        f"{path}: {size:,} bytes, and free memory has room for {most:,} of text; give a part of it"
    )
