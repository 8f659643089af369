"""The `kizzasi` program: one file per verb."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import sys
from collections.abc import Sequence

from kizzasi.cli.common import import_own
from kizzasi.errors import KizzasiError

VERBS = ("search", "report", "export", "train", "generate", "info", "validate", "schema", "convert")
USER_ERROR, INTERRUPTED, PIPE_CLOSED = 2, 130, 141
SEED = "of everything random (default 0; generate takes a new one each time)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        The exit code: 0, 2 for a user's error, 130 after Ctrl-C, 141 if nobody reads on.
    """
    parser = argparse.ArgumentParser(
        prog="kizzasi", description="Sequence models and the search for good ones."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    modules = {verb: importlib.import_module(f"kizzasi.cli.{verb}") for verb in VERBS}
    for verb, module in modules.items():
        text = module.__doc__ or ""
        own = verbs.add_parser(
            verb,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        own.add_argument("--seed", type=int, default=0, help=SEED)
        own.add_argument("--device", default="cpu", help='"cpu" (default), "cuda", "cuda:1"')
        own.add_argument("--json", action="store_true", help="print one JSON object instead")
        own.add_argument(
            "--import",
            dest="imports",
            action="append",
            default=[],
            metavar="MODULE",
            help="import it first: a module of your own that registers mixers (may be repeated)",
        )
        module.add_arguments(own)
    args = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="replace"
        )  # what the terminal cannot show is no reason to die
    try:
        import_own(args.imports)
        result, text = modules[args.verb].run(args)
        print(json.dumps(result) if args.json else text, flush=True)
    except KizzasiError as error:
        print(f"kizzasi {args.verb}: {error}", file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:
        # Python would try once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"kizzasi {args.verb}: {place}{error.strerror or error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        more = "; --resume continues" if "resume" in vars(args) else ""
        print(f"\nkizzasi {args.verb}: stopped{more}", file=sys.stderr)
        return INTERRUPTED
    return 0
