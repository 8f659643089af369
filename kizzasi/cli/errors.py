"""Every error of a program in one line: no traceback, and nothing that a terminal would obey."""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path

from kizzasi.errors import KizzasiError
from kizzasi.files import no_room

MOST = 700  # characters of a message
SHOW = "KIZZASI_TRACEBACK"
# What input can cause that nobody foresaw; everything else is a fault of the program.
OF_INPUT = (MemoryError, RecursionError, UnicodeError, OverflowError)
# What torch says, as a RuntimeError or a type of its own, when memory runs out.
NO_MEMORY = re.compile(r"can't allocate memory|out of memory|DefaultCPUAllocator", re.IGNORECASE)


class Fault(Exception):
    """A fault of the program itself, told in one line."""


def shown(text: str, *, lines: bool = False) -> str:
    """Text without control characters, direction marks and lone surrogates.

    Args:
        text: from anywhere.
        lines: keep line ends and tabs.
    """
    kept = "\n\t" if lines else ""
    text = text if lines else " ".join(text.split())
    return "".join(c if c.isprintable() or c in kept else "\ufffd" for c in text)


def line_of(error: BaseException) -> tuple[str, int]:
    """What to print of an error, and the exit code: 2 for a user's, 1 for the program's own."""
    text, code = _told(error)
    text = shown(text)
    return (text if len(text) <= MOST else f"{text[: MOST - 1]}…"), code


def _told(error: BaseException) -> tuple[str, int]:
    name = type(error).__name__
    if isinstance(error, KizzasiError):
        return str(error), 2
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        remedy = "; make room and try again" if no_room(error) else ""
        return f"{place}{error.strerror or error}{remedy}", 2
    if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
        return "not enough memory; give less data, a smaller model, or smaller numbers", 2
    if isinstance(error, RecursionError):
        return "the input is nested too deeply", 2
    if isinstance(error, UnicodeError):
        return f"the input is no text in the encoding that it should have: {error}", 2
    if isinstance(error, OverflowError):
        return f"a number is too large: {error}", 2
    if name == "PanicException":  # of a package in Rust; derives from BaseException
        return f"a package gave up on the input: {error}", 2
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"a fault of the program{place}: {name}: {error}; {SHOW}=1 shows more", 1


def is_told(error: BaseException) -> bool:
    """Whether an error is told in a line at all; Ctrl-C and sys.exit go their own ways."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def wants_traceback() -> bool:
    return bool(os.environ.get(SHOW))
