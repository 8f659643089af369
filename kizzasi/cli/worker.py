"""Run trials of a search that was started with --executor files, here or on another machine.

Any number of workers may come and go; each takes what nobody has begun, and ends with the search.
Killed at any moment, its trial is given to another one. See docs/machines.md for a SLURM array.

example:
  kizzasi search --data ~/notes --out runs/notes --executor files --workers 8
  kizzasi worker runs/notes                     # eight times, on machines that see the folder
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from kizzasi.cli.common import usable_device
from kizzasi.errors import SpecError, StudyError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="folder of the search, on a file system that both see")
    parser.add_argument(
        "--patience",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds to wait for a search that has not begun, or is gone (600)",
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kizzasi.nas.executors.files import OWNER, QUEUE, serve

    device, folder = usable_device(args.device), Path(args.run)
    if not args.patience > 0:
        raise SpecError(f"--patience {args.patience:g}: give seconds, above 0")
    until = time.monotonic() + args.patience
    while not (folder / QUEUE / OWNER).exists():
        if time.monotonic() > until:
            raise StudyError(
                f"{folder}: no search hands out trials there; start it with --executor files"
            )
        time.sleep(0.5)
    n = serve(folder, _evaluator(folder), device, patience=args.patience)
    return {"run": str(folder), "trials": n}, f"{folder}: over; {n} trials ended here"


def _evaluator(folder: Path) -> Any:
    """The evaluator of the search in the folder, from its own settings and data."""
    from kizzasi.nas.executors.work import Work
    from kizzasi.nas.study.config import SearchConfig
    from kizzasi.nas.study.identity import settings_of
    from kizzasi.nas.study.journal import read_run
    from kizzasi.nas.study.named import plan_of
    from kizzasi.train.open import open_task

    told = settings_of(folder / "journal.jsonl")
    if told is None:
        raise StudyError(f"{folder}: holds no search")
    config = SearchConfig.from_dict(told.config)
    task = open_task(
        config.data, test_fraction=config.test_fraction, apart=folder, test=config.test
    )
    study = next(e for e in read_run(folder / "journal.jsonl") if e["event"] == "study")
    if task.digest != study["data"]["digest"]:
        raise StudyError(
            f"{folder}: {task.name} is not the data of that search here; give both the same files"
        )
    plan = plan_of(config, task, told.space)
    return Work(plan.micro_training, plan.seed)
