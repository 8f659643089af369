"""The `kizzasi` program: one file per verb."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence

from kizzasi.cli.common import import_own
from kizzasi.errors import KizzasiError

VERBS = ("search", "report", "export", "train", "generate", "info", "validate", "convert")
USER_ERROR, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0, 2 for a user's error, 130 after Ctrl-C."""
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
        own.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
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
    try:
        import_own(args.imports)
        result, text = modules[args.verb].run(args)
    except KizzasiError as error:
        print(f"kizzasi {args.verb}: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"kizzasi {args.verb}: {place}{error.strerror or error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"kizzasi {args.verb}: stopped; --resume continues", file=sys.stderr)
        return INTERRUPTED
    print(json.dumps(result) if args.json else text)
    return 0
