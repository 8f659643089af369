"""Published results at the size of a laptop: who solves which task, beside what papers report.

Each table trains a few models from scratch. Seed 0 tries a table's learning rates in turn, until
one gives 99.9 % right answers, and keeps the one with the best score on valid; the other seeds
train at that rate. What is printed is the median and range over seeds on further examples.
"published" is what the source reports in its own, larger setting: who wins should agree, the
figures need not. `--published` takes that setting where the table has it, and wants a GPU.

Recorded data is read from packages of others, and never downloaded; where it is missing, a line
says how to get it.

examples:
  python scripts/reproduce.py parity --seeds 3 --plot parity.svg
  python scripts/reproduce.py dna --data unpacked
  python scripts/reproduce.py --list
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from reproductions import TABLES
from reproductions.printed import picture, printed, published
from reproductions.table import run
from tqdm import tqdm

from kizzasi.errors import DataError


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", nargs="?", choices=list(TABLES))
    parser.add_argument("--list", action="store_true", help="the tables and their sources")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of every training (default: the table's)")
    parser.add_argument("--data", type=Path, help="folder or wheel that holds recorded data")
    parser.add_argument("--published", action="store_true", help="the published setting")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--json", type=Path, help="write every score to this file")
    parser.add_argument("--plot", type=Path, help="write a picture to this .svg")
    args = parser.parse_args(arguments)
    if args.seeds < 1 or (args.steps is not None and args.steps < 1):
        parser.error(f"--seeds {args.seeds}, --steps {args.steps}: give at least 1")
    if args.published and args.table and not TABLES[args.table].published:
        parser.error(f"--published: {args.table} has none; see its source by --list")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parsed(arguments)
    if args.list or args.table is None:
        for name, table in TABLES.items():
            print(f"{name:20} {table.source}")
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    table = TABLES[args.table]
    if args.published:
        table = replace(published(table), published={})
    if args.steps:
        table = replace(table, steps=args.steps)
    try:
        problem = table.problem(args.data)
    except DataError as error:
        raise SystemExit(str(error)) from None
    with tqdm(unit="tok", unit_scale=True, disable=None) as bar:
        rows = run(table, problem, args.seeds, bar.update)
    if args.json:
        args.json.write_text(json.dumps({"table": args.table, "steps": table.steps, "rows": rows}))
    if args.plot:
        args.plot.write_text(picture(args.table, table, problem, rows))
    print(printed(table, problem, rows))


if __name__ == "__main__":
    main()
