"""Files that appear whole or not at all: the one routine by which kizzasi writes what lasts.

Every file is written under a new random name in its own folder, flushed to the disk, looked at if
the caller wants, and renamed. A crash leaves the old file or the new one, and never a half. A link
in the way is replaced, not followed; permissions are those of the process's umask. What a disk
without room cannot take is an OSError that names the file, whatever made the bytes.

Reading is as careful: regular files only (a pipe would wait for ever), and no more than is wanted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

FLAGS = os.O_CREAT | os.O_EXCL | os.O_WRONLY
FLAGS |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
CHUNK = 2**20  # bytes read at once
LOOK_SECONDS = 0.05
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TORCHS = re.compile(r"inline_container\.cc|PytorchStreamWriter|unexpected pos", re.IGNORECASE)
PARTIAL = re.compile(r"\..+\.[0-9a-f]{16}\.partial")


class Sink(Protocol):
    """What a file is to those who fill it."""

    def write(self, data: Any, /) -> int: ...

    def flush(self) -> object: ...


class Source(Protocol):
    """What a file is to those who read it."""

    def read(self, n: int, /) -> bytes: ...


Make = Callable[[Any], object]  # is handed a Sink


class _Watched:
    """A file that remembers why it could not take something; torch.save raises other errors."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        try:
            self.file.flush()
        except OSError as error:
            self.error = error
            raise


def no_room(error: BaseException) -> bool:
    """Whether a disk, a quota or a limit on file sizes is full, in the words of Python or torch."""
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    return isinstance(error, RuntimeError) and TORCHS.search(str(error)) is not None


def write_file(path: Path, make: Make, check: Callable[[Path], object] | None = None) -> None:
    """Write one file; see `write_files`."""
    write_files({path: make}, None if check is None else lambda paths: check(paths[0]))


def write_text(path: Path, text: str) -> None:
    """Write one file of UTF-8; names of files may be no text, and show as question marks."""
    write_file(path, lambda file: file.write(text.encode(errors="replace")))


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
        OSError: a folder or file cannot be written; it has the name of that file.
    """
    partial = {path: _beside(path) for path in makers}
    with _removed(partial.values()):
        for path, make in makers.items():
            with _named(path):
                _fill(partial[path], make)
        if check is not None:
            check(list(partial.values()))
        for path in makers:
            with _named(path):
                os.replace(partial[path], path)
    for path in set(stale) - makers.keys():
        path.unlink(missing_ok=True)
    for folder in {path.parent for path in makers}:
        _sync(folder)


def _fill(path: Path, make: Make) -> None:
    with os.fdopen(os.open(path, FLAGS, 0o666), "wb") as file:
        watched = _Watched(file)
        try:
            make(watched)
            watched.flush()
        except BaseException:
            if watched.error is None:
                raise
            raise watched.error from None
        os.fsync(file.fileno())


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of the system say which file it was, under the name that it would have had."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


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


def clear_partial(folder: Path) -> None:
    """Remove what a writer left that was killed; for those who hold the folder's lock."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if PARTIAL.fullmatch(path.name) and not path.is_symlink():
            path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """The names are on the disk too, where the system can say so."""
    with contextlib.suppress(OSError):
        place = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)


def open_regular(path: str | os.PathLike[str], *, follow: bool = True) -> BinaryIO:
    """Open a regular file to read it: a pipe or a device would hang, or never end.

    Raises:
        OSError: it cannot be opened, is no regular file, or is a link that may not be followed.
    """
    flags = READ if follow else READ | getattr(os, "O_NOFOLLOW", 0)
    try:
        place = os.open(path, flags)
    except ValueError as error:  # a zero byte
        raise OSError(errno.EINVAL, f"no name of a file ({error})", str(path)) from error
    if not stat.S_ISREG(os.fstat(place).st_mode):
        os.close(place)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(place, "rb")


def read_bytes(path: str | os.PathLike[str], most: int, *, follow: bool = True) -> bytes:
    """A regular file's bytes. Raises OSError also where there are more than `most`."""
    with open_regular(path, follow=follow) as file:
        content = read_most(file, most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"larger than {most:,} bytes", str(path))
    return content


def read_most(file: Source, most: int) -> bytes:
    """Up to so many bytes of a file; `read(most)` would first reserve them all."""
    parts, left = list[bytes](), most
    while left > 0 and (piece := file.read(min(left, CHUNK))):
        parts.append(piece)
        left -= len(piece)
    return b"".join(parts)


class BusyError(Exception):
    """Another process holds the lock."""


if sys.platform == "win32":
    import msvcrt

    def lock(place: int) -> None:
        """Hold an open file alone, as long as it is open. Raises BusyError."""
        # Windows locks keep readers out too, so lock one byte far behind any file's end.
        os.lseek(place, 1 << 30, os.SEEK_SET)
        try:
            msvcrt.locking(place, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BusyError from error

    def is_held(path: Path) -> bool:
        """Whether a process holds this file's lock: nobody can say."""
        return True

    @contextlib.contextmanager
    def only_writer(folder: Path) -> Iterator[None]:
        """Hold a folder; Windows opens none, so a file in it stands for it."""
        path = folder / ".lock"
        place = os.open(path, os.O_CREAT | os.O_RDWR)
        try:
            lock(place)
            yield
        finally:
            os.close(place)
            with contextlib.suppress(OSError):
                path.unlink()

else:
    import fcntl

    def lock(place: int) -> None:
        """Hold an open file or folder alone, as long as it is open: the kernel's lock goes with the
        process, even by kill -9. Raises BusyError, or OSError where there are no locks."""
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOOK_SECONDS)  # somebody may only have looked; see `is_held`
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BusyError from error

    def is_held(path: Path) -> bool:
        """Whether a process holds this file's lock; True where nobody can say."""
        try:
            with open_regular(path) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        return False

    @contextlib.contextmanager
    def only_writer(folder: Path) -> Iterator[None]:
        """Hold a folder alone. Raises BusyError, or OSError where there are no locks."""
        place = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            lock(place)
            yield
        finally:
            os.close(place)
