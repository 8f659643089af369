"""The `kizzasi` program: one file per verb."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress

from kizzasi.cli.errors import is_told, line_of, shown, wants_traceback
from kizzasi.cli.parsing import PROG, VERBS, parse

__all__ = ["VERBS", "main"]
INTERRUPTED, PIPE_CLOSED = 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        The exit code: 0, 2 for a user's error, 1 for one of the program, 130 after Ctrl-C, 141 if
        nobody reads on.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = argparse.Namespace()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a terminal cannot show is no reason to die
    try:
        from kizzasi.cli.common import import_own
        from kizzasi.progress import starting

        asks = not {"-h", "--help"}.isdisjoint(given)
        with starting("" if asks else f"{_name(given)}: starting"):
            module, args = parse(given)
        import_own(args.imports)
        result, text = module.run(args)
        _print(json.dumps(result) if args.json else text, raw=args.json or args.verb == "generate")
    except BrokenPipeError:
        _close_stdout()
        return PIPE_CLOSED
    except KeyboardInterrupt:
        more = "; --resume continues" if "resume" in vars(args) else ""
        print(f"\n{_name(given)}: stopped{more}", file=sys.stderr)
        return INTERRUPTED
    except BaseException as error:
        if not is_told(error):
            raise
        if wants_traceback():
            traceback.print_exc()
        return _tell(error, given)
    return 0


def _tell(error: BaseException, given: Sequence[str]) -> int:
    if isinstance(error, OSError) and error.filename is None:
        _close_stdout()
    lines = vars(error).get("lines") or [None]
    code = 2
    for line in lines:
        text, code = line_of(error) if line is None else (shown(line), 2)
        text = text.removeprefix(f"{given[0]}: ") if given and given[0] in VERBS else text
        print(f"{_name(given)}: {text}", file=sys.stderr)
    return code


def _name(given: Sequence[str]) -> str:
    return f"{PROG} {given[0]}" if given and given[0] in VERBS else PROG


def _print(text: str, *, raw: bool) -> None:
    print(text if raw and not sys.stdout.isatty() else shown(text, lines=True), flush=True)


def _close_stdout() -> None:
    """Python would try once more at exit, and complain."""
    with suppress(OSError, ValueError):  # it may be no file, as in a test
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
