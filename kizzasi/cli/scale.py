"""Say what a search's best model would reach at the next size, by a power law through smaller ones.

The design is trained at several widths, on as many tokens for each parameter, at the rates that the
search found, carried over by muP. Killed at any moment, it goes on when called again.

example:
  kizzasi scale runs/first
  kizzasi scale runs/first --shares 0.25 0.5 1 --next 2 --seeds 3 --check
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kizzasi.cli.common import check_numbers, columns, usable_device
from kizzasi.errors import SpecError, StudyError

if TYPE_CHECKING:
    from kizzasi.nas.study.scaling import Scaling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="folder of a finished search")
    parser.add_argument("--out", help="folder of the trainings' journal (default RUN/scaling)")
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=[0.25, 0.5, 1.0],
        help="sizes to train, as shares of the model's (0.25 0.5 1)",
    )
    parser.add_argument("--next", type=float, default=2.0, help="the size to predict (2)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each size (3)")
    parser.add_argument(
        "--tokens", type=int, help="of a training at the model's own size (default: the search's)"
    )
    parser.add_argument("--check", action="store_true", help="train the next size, too")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from tqdm import tqdm

    from kizzasi.models import ModelSpec
    from kizzasi.nas.results.summary import summarise
    from kizzasi.nas.study.config import SearchConfig
    from kizzasi.nas.study.identity import settings_of
    from kizzasi.nas.study.journal import read_run
    from kizzasi.nas.study.named import plan_of
    from kizzasi.nas.study.scaling import scaling_fit
    from kizzasi.train.open import open_task

    check_numbers(args, "seeds")
    device = usable_device(args.device)
    if len(set(args.shares)) < 2 or min(*args.shares, args.next) <= 0:
        raise SpecError("--shares: give two or more different sizes above 0, and --next above 0")
    folder = Path(args.run)
    journal = folder / "journal.jsonl"
    told, summary = settings_of(journal), summarise(read_run(journal))
    if told is None or summary.saved is None or not summary.finished:
        raise StudyError(f"{folder}: holds no finished search; resume it, then call again")
    config = SearchConfig.from_dict(told.config)
    task = open_task(
        config.data, test_fraction=config.test_fraction, apart=folder, test=config.test
    )
    if task.digest != summary.study["data"]["digest"]:
        raise StudyError(f"{folder}: {task.name} is not the data of that search any more")
    evaluator = plan_of(config, task, told.space).micro_training
    budget = args.tokens or config.final_tokens
    n = len(args.shares) + args.check
    total = round(args.seeds * budget * (sum(args.shares) + args.check * args.next))
    with tqdm(total=total, unit="tok", unit_scale=True, desc=f"{n} sizes", disable=None) as bar:
        found = scaling_fit(
            ModelSpec.from_dict(summary.saved.entry["spec"]),
            evaluator,
            summary.saved.trials[0]["settings"],
            Path(args.out or folder / "scaling"),
            shares=args.shares,
            next_share=args.next,
            budget=budget,
            seeds=args.seeds,
            check=args.check,
            device=device,
            report=bar.update,
        )
    return _plain(found), _said(found, task.metric.label)


def _plain(found: Scaling) -> dict[str, Any]:
    sizes = [
        {"params": s.params, "d_model": s.spec.d_model, "tokens": s.budget, "scores": s.scores}
        for s in (*found.sizes, found.next)
    ]
    return {
        "sizes": sizes,
        "exponent": found.law.exponent(),
        "spread": found.law.spread,
        "predicted": found.predicted,
        "held": found.held,
    }


def _said(found: Scaling, metric: str) -> str:
    rows = [["parameters", "width", "tokens", metric]]
    for size in found.sizes:
        scores = ", ".join("failed" if s is None else f"{s:.3f}" for s in size.scores)
        rows.append([f"{size.params:,}", str(size.spec.d_model), f"{size.budget:,}", scores])
    value, low, high = found.predicted
    b, least, most = found.law.exponent()
    wanted = found.next
    lines = [
        columns(rows),
        f"each doubling of parameters and tokens: x {2**-b:.4f}; exponent {b:.4f} "
        f"[{least:.4f}, {most:.4f}]",
        f"{wanted.params:,} parameters, {wanted.budget:,} tokens: {value:.3f} "
        f"[{low:.3f}, {high:.3f}] expected",
    ]
    if wanted.mean is not None:
        where = "inside" if found.held else "outside"
        lines.append(f"trained: {wanted.mean:.3f}, {where} the interval")
    return "\n".join(lines)
