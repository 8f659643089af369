"""Files that appear whole or not at all: the one routine by which kizzasi writes what lasts.

Every file is written under a new random name in its own folder, flushed to the disk, looked at if
the caller wants, and renamed. A crash leaves the old file or the new one, and never a half. A link
in the way is replaced, not followed; permissions are those of the process's umask.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

Make = Callable[[BinaryIO], object]
FLAGS = os.O_CREAT | os.O_EXCL | os.O_WRONLY
FLAGS |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def write_file(path: Path, make: Make, check: Callable[[Path], object] | None = None) -> None:
    """Write one file; see `write_files`."""
    write_files({path: make}, None if check is None else lambda paths: check(paths[0]))


def write_text(path: Path, text: str) -> None:
    """Write one file of UTF-8."""
    write_file(path, lambda file: file.write(text.encode()))


def write_files(
    makers: Mapping[Path, Make],
    check: Callable[[Sequence[Path]], object] | None = None,
    stale: Sequence[Path] = (),
) -> None:
    """Write files that belong together: all are complete before the first gets its name.

    Args:
        makers: what fills each file. They get their names in this order: the one that makes the
            others count comes last.
        check: looks at the complete files, still under other names, in the order of `makers`. What
            it raises is passed on, and nothing has changed then.
        stale: files of an earlier set, removed at the end where they exist.

    Raises:
        OSError: a folder or file cannot be written.
    """
    partial = {path: _beside(path) for path in makers}
    with _removed(partial.values()):
        for path, make in makers.items():
            with os.fdopen(os.open(partial[path], FLAGS, 0o666), "wb") as file:
                make(file)
                file.flush()
                os.fsync(file.fileno())
        if check is not None:
            check(list(partial.values()))
        for path in makers:
            os.replace(partial[path], path)
    for path in set(stale) - makers.keys():
        path.unlink(missing_ok=True)
    for folder in {path.parent for path in makers}:
        _sync(folder)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name[:100]}.{os.urandom(8).hex()}.partial")


@contextlib.contextmanager
def _removed(paths: Iterable[Path]) -> Iterator[None]:
    """Whatever happens, none of these is left."""
    try:
        yield
    finally:
        for path in paths:
            with contextlib.suppress(OSError):
                os.unlink(path)


def _sync(folder: Path) -> None:
    """The names are on the disk too, where the system can say so."""
    with contextlib.suppress(OSError):
        place = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)
