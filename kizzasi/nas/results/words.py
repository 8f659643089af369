"""Settings and failures in a few words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

SLASH = r"[/\\]"
FRAME = re.compile(r'File "(.*)", line (\d+), in (.*)')


def gist(text: str) -> str:
    """The error that a traceback ends in, and the line of code that raised it."""
    lines = text.strip().splitlines() or [""]
    raised = [match for line in lines if (match := FRAME.search(line))]
    if not raised:
        return lines[-1]
    file, number, function = raised[-1].groups()
    return f"{lines[-1]} ({re.split(SLASH, file)[-1]}:{number} in {function})"


def printable(text: str) -> str:
    """Text as a terminal or a page may show it: lines stay, and controls become U+FFFD."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def said(settings: Mapping[str, Any]) -> str:
    """Settings in a few words."""
    shown = (f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items())
    return ", ".join(shown) or "as they are"
