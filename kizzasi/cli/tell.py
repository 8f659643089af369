"""Write down what jobs of `kizzasi ask` gave; JSON lines from a file or the standard input.

example:
  echo '{"id": "2f6c0b...-9", "score": 1.31}' | kizzasi tell runs/mine
  kizzasi tell runs/mine results.jsonl
  echo '{"spec": {"d_model": 64, ...}}' | kizzasi tell runs/mine

A line has the id of a job and its score; a job that failed has a score of null and a "failure" that
says why. "spent", "seconds" and "curve" (pairs of budget spent and training loss) may be told too.

A line with a "spec" alone puts an architecture of your own among the candidates: it keeps the
bounds of the search, need not lie in its space, and comes before what the searcher proposes next.
`kizzasi ask` then has its job, with the budget, the seed and the settings that the others have.

If a line is wrong, each one that is is named and nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from kizzasi.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="folder of the search")
    parser.add_argument("file", nargs="?", help="of JSON lines (default: the standard input)")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kizzasi.nas.elsewhere import plan_in, tell

    folder = Path(args.run)
    plan = plan_in(folder)
    try:
        text = Path(args.file).read_text("utf-8") if args.file else sys.stdin.read()
    except OSError as error:
        raise DataError(f"{args.file}: cannot be read: {error.strerror}") from error
    n = tell(plan, folder, text.splitlines())
    return {"told": n}, f"{n} told"
