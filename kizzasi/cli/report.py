"""Write a search's report.md and report.html anew, also while the search goes on.

example:
  kizzasi report runs/first
  kizzasi report runs/first --watch      # until the search is complete; Ctrl-C ends it
"""

from __future__ import annotations

import argparse
import errno
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kizzasi.errors import SpecError, StudyError
from kizzasi.files import is_held

if TYPE_CHECKING:
    from kizzasi.nas.results.finals import Event
    from kizzasi.nas.results.summary import Summary

FILES = ("report.md", "report.html")
NOT_OURS = (errno.EROFS, errno.EACCES, errno.EPERM)  # a run of somebody else's
CLEAR = "\x1b[H\x1b[2J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="folder of a search")
    parser.add_argument("--out", help="folder of report.md and report.html (default RUN)")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=5.0,
        metavar="SECONDS",
        help="look again every few seconds (5) until the search is complete",
    )
    parser.add_argument(
        "--tensorboard", metavar="FOLDER", help="write the learning curves as event files too"
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kizzasi.nas.report.other_tools import to_tensorboard
    from kizzasi.nas.report.status import pace_of, status
    from kizzasi.nas.study.journal import read_run

    if args.watch is not None and not args.watch > 0:
        raise SpecError(f"--watch {args.watch:g}: give a number of seconds above 0")
    folder = Path(args.run)
    out = Path(args.out or folder)
    if args.out:
        out.mkdir(parents=True, exist_ok=True)
    summary, files = _write(out, read_run(folder / "journal.jsonl"))
    if args.watch is not None:
        summary = _watch(folder, out if files else None, summary, args.watch, quiet=args.json)
    if args.tensorboard:
        to_tensorboard(folder, Path(args.tensorboard))
    best = summary.best
    result = {
        "finished": summary.finished,
        "candidates": len(summary.entries),
        "trials": len(summary.trials),
        "failures": len(summary.failures),
        "best": best.entry["id"] if best else None,
        "files": files,
    }
    alive = is_held(folder / "journal.jsonl")
    screen = "" if args.watch else f"{status(summary, pace_of(summary), alive=alive)}\n\n"
    return result, screen + "\n".join(files)


def _write(out: Path, events: Sequence[Event]) -> tuple[Summary, list[str]]:
    """What is known, and the files that say it; none, which is said, where it is not ours to
    write."""
    from kizzasi.nas.report.pages import write_report
    from kizzasi.nas.results.summary import summarise

    try:
        return write_report(out, events), [str(out / name) for name in FILES]
    except StudyError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno not in NOT_OURS:
            raise
        print(f"{out}: {cause.strerror}; --out writes the report elsewhere", file=sys.stderr)
        return summarise(events), []


def _watch(
    folder: Path, out: Path | None, summary: Summary, pause: float, *, quiet: bool
) -> Summary:
    """Show the state again and again until the search is complete or the user has seen enough."""
    from kizzasi.nas.report.pages import write_report
    from kizzasi.nas.report.status import pace_of, status
    from kizzasi.nas.results.summary import summarise
    from kizzasi.nas.study.journal import read_run

    known, begin, trained = 0, time.monotonic(), pace_of(summary).seconds
    try:
        while True:
            gained = pace_of(summary).seconds - trained
            side_by_side = gained / (time.monotonic() - begin) if gained > 0 else None
            if not quiet:
                clear = CLEAR if sys.stdout.isatty() else ""
                alive = is_held(folder / "journal.jsonl")
                screen = status(summary, pace_of(summary, side_by_side), alive=alive)
                print(f"{clear}{screen}\n", flush=True)
            if summary.finished:
                break
            time.sleep(pause)
            events = read_run(folder / "journal.jsonl")
            if len(events) > known:
                summary = write_report(out, events) if out else summarise(events)
                known = len(events)
    except KeyboardInterrupt:
        pass  # the way to end it; the search itself is another process and goes on
    return summary
