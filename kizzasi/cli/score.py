"""Score a model on held-out data, beside what simple models reach there.

The data are split as in a training or search, so that the numbers compare: what is scored was never
trained on there. With the --seq-len, --batch-size and --score-windows of a search, the score of its
best model is the one of its report.

example:
  kizzasi score runs/notes --data ~/notes
  kizzasi score models/mine --data other.txt --split test --score-windows 0
"""

from __future__ import annotations

import argparse
from typing import Any

from kizzasi.cli.common import (
    SCORE_WINDOWS,
    add_engine,
    check_device,
    check_numbers,
    checkpoint_of,
    scoring,
)
from kizzasi.errors import DataError
from kizzasi.progress import Line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a checkpoint folder or file, or a search's folder")
    parser.add_argument("--data", required=True, help='as of train, or "builtin"')
    parser.add_argument("--split", choices=("valid", "test"), default="valid", help="default valid")
    add_engine(parser)
    parser.add_argument("--seq-len", type=int, default=256, help="window in tokens (default 256)")
    parser.add_argument("--batch-size", type=int, default=16, help="windows at once (default 16)")
    parser.add_argument(
        "--score-windows",
        type=int,
        default=SCORE_WINDOWS,
        help=f"windows to score, evenly spread (default {SCORE_WINDOWS}; 0 for all)",
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    with Line("score") as line:
        line.say("starting")
        return _run(args, line)


def _run(args: argparse.Namespace, line: Line) -> tuple[dict[str, Any], str]:
    import torch

    from kizzasi.models import load
    from kizzasi.train.bytes import baselines_of
    from kizzasi.train.open import open_task
    from kizzasi.train.task import Shape
    from kizzasi.train.trainer import to_score

    check_device(args.device)
    check_numbers(args, "seq_len", "batch_size")
    path = checkpoint_of(args.model)
    task = open_task(args.data)
    if not task.has(args.split):
        raise DataError(f"{args.data}: has no split {args.split}")
    model = load(path, device=args.device, engine=args.engine).eval()
    shape = Shape(args.seq_len, args.batch_size, args.score_windows or None)
    task.check(shape, model.spec.stem)
    task = task.to(torch.device(args.device))
    with scoring(line, model, args.score_windows, args.batch_size), torch.no_grad():
        found = task.score(to_score(model, task), args.split, shape)
    score, beside = found.mean(task.metric), baselines_of(task, line)
    result = {
        "model": path,
        "data": task.name,
        "digest": task.digest,
        "split": args.split,
        "windows": len(found.values),
        "metric": task.metric.name,
        "score": score,
        "baselines": beside,
    }
    others = ", ".join(f"{name} {value:.3f}" for name, value in beside.items())
    said = f"{path}: {score:.4f} {task.metric.label} on {args.split} ({others})"
    return result, f"{said}\n{len(found.values)} windows of {args.seq_len}; data {task.digest[:12]}"
