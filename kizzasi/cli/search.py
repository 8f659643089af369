"""Search a good small sequence model for your bytes; about 3 minutes on 2 cores by default.

example:
  kizzasi search --data ~/notes --params 300000 --out runs/notes
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from kizzasi.cli.common import check_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from kizzasi.nas.search import SearchConfig

    default = SearchConfig()
    parser.add_argument("--data", help='a file or folder of bytes, or "stdlib"; default: built in')
    parser.add_argument("--out", default="runs/first", help="folder (default runs/first)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    number = {"type": int, "metavar": "N"}
    for flag, name, text in (
        ("--params", "n_params", "parameter budget"),
        ("--candidates", "n_pool", "candidates that the proxy scores"),
        ("--best", "n_best", "trained: the best by proxy"),
        ("--random", "n_random", "trained: a random control group"),
        ("--outside", "n_outside", "trained briefly: from outside the parameter band"),
        ("--tokens", "final_tokens", "budget of the final training"),
        ("--final-seeds", "final_seeds", "final trainings of the winner and of the preset"),
        ("--seq-len", "seq_len", "training window in tokens"),
        ("--batch-size", "batch_size", "windows a step"),
    ):
        value = getattr(default, name)
        parser.add_argument(flag, dest=name, default=value, help=f"{text} ({value})", **number)
    parser.add_argument(
        "--band", type=float, default=default.band, help=f"width of the band ({default.band})"
    )
    parser.add_argument(
        "--rungs",
        type=int,
        nargs="+",
        default=list(default.rungs),
        help=f"tokens at each rung ({' '.join(map(str, default.rungs))})",
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kizzasi.nas.report import summarise, table
    from kizzasi.nas.search import Search, SearchConfig

    check_device(args.device)
    names = SearchConfig().to_dict().keys() & vars(args).keys()
    config = SearchConfig.from_dict({name: getattr(args, name) for name in names})
    folder = Path(args.out)
    workers = args.workers or os.cpu_count() or 1
    search = Search(config, folder, workers=workers, device=args.device)
    events = search.run(resume=args.resume)
    result = {"folder": str(folder), "best": str(folder / "best"), **events[-1]}
    return result, f"{table(summarise(events))}\n{folder / 'report.html'}\n{folder / 'best'}"
