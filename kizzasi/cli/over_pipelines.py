"""What `sweep` and `evolve` share: the seeds, the task, the recipe, and what they write."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kizzasi.cli.common import (
    SeveralErrors,
    check_device,
    check_numbers,
    columns,
    is_pipeline_file,
    markdown,
    read_spec,
)
from kizzasi.errors import SpecError

if TYPE_CHECKING:
    from kizzasi.models import ModelSpec
    from kizzasi.nas import Found
    from kizzasi.nas.evaluators.micro_training import MicroTrain
    from kizzasi.nas.executors import Executor
    from kizzasi.nas.pipelines import PipelineSpace


def add_common(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument(
        "seeds", nargs="+", metavar="CFG", help="pipelines (.yaml), specs, checkpoints, or folders"
    )
    parser.add_argument("--data", help='as for train: text, ids, or "stdlib"; default: built in')
    parser.add_argument("--out", default=out, help=f"folder (default {out})")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    parser.add_argument("--seq-len", type=int, default=128, help="window in tokens (default 128)")
    parser.add_argument("--batch-size", type=int, default=8, help="windows a step (default 8)")
    parser.add_argument("--lr", type=float, default=8e-3, help="peak learning rate (default 8e-3)")
    parser.add_argument(
        "--optimizer", choices=("muon", "adamw"), default="muon", help="default muon"
    )
    parser.add_argument(
        "--scale", type=float, help="shrink pipelines' widths and vocabulary to this share first"
    )
    parser.add_argument(
        "--repair", action="store_true", help="take what does not fit as its remedy says"
    )
    parser.add_argument("--workers", type=int, default=1, help="trials side by side (default 1)")
    parser.add_argument(
        "--score-windows", type=int, default=256, help="held-out windows of a score (default 256)"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument(
        "--final-seeds", type=int, default=1, help="final trainings of the best (default 1)"
    )


def evaluator_of(args: argparse.Namespace, steps: int) -> MicroTrain:
    """The training that every trial is; steps: of the longest."""
    from kizzasi.nas import MicroTrain
    from kizzasi.nas.pipelines import observed
    from kizzasi.train import Recipe
    from kizzasi.train.open import open_task

    check_device(args.device)
    numbers = ("seq_len", "batch_size", "asha_min", "asha_max", "workers", "final_seeds")
    check_numbers(args, *numbers)
    recipe = Recipe(
        steps * args.seq_len * args.batch_size,
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        lr=args.lr,
        optimizer=args.optimizer,
        score_windows=args.score_windows,
    )
    recipe.check()
    return MicroTrain(open_task(args.data), recipe, observed)


def space_of(args: argparse.Namespace, evaluator: MicroTrain) -> PipelineSpace:
    """The space over all seeds, with the stem of the task. Raises SpecError also for a seed that
    plainly does not fit in memory."""
    from kizzasi.nas.pipelines import PipelineSpace
    from kizzasi.train.memory import require_memory

    seeds = _seeds(args)
    if not seeds:
        raise SpecError(f"{', '.join(args.seeds)}: no .yaml file in it; name pipelines")
    for spec, file in seeds.items():
        try:
            require_memory(spec, evaluator.recipe, args.device)
        except SpecError as error:
            raise SpecError(f"{file}: {error}") from error
    return PipelineSpace(tuple(seeds), evaluator.task.stem)


def _seeds(args: argparse.Namespace) -> dict[ModelSpec, str]:
    """The seeds, equal ones once, and the file of each."""
    files = [str(file) for source in args.seeds for file in _files(source)]
    found: dict[ModelSpec, str] = {}
    for file in files:
        found.setdefault(_seed(file, args), file)
    return found


def _files(source: str) -> list[Path]:
    path = Path(source)
    if path.is_dir() and not (path / "config.json").exists():
        return sorted(path.glob("*.yaml"))
    return [path]


def _seed(source: str, args: argparse.Namespace) -> ModelSpec:
    if not is_pipeline_file(source):
        return read_spec(source)
    from kizzasi.nas.pipelines import Pipeline, load, repaired, scaled

    data = load(source)
    try:
        if args.repair:
            data, _ = repaired(data)
        if args.scale is not None:
            data, _ = scaled(data, args.scale)
        return Pipeline.from_data(data).spec
    except SpecError as error:
        lines = [f"{source}: {line}" for line in str(error).split("\n")]
        raise SeveralErrors([*lines, "--repair takes each as its remedy says"]) from error


def executor_of(args: argparse.Namespace) -> Callable[[Any], Executor]:
    from kizzasi.nas.executors import open_executor

    return lambda evaluator: open_executor(evaluator, None, args.workers, device=args.device)


def finished(
    found: Found, args: argparse.Namespace, n_breadth: int, seeds: tuple[ModelSpec, ...]
) -> tuple[dict[str, Any], str]:
    """Write search_report.json, and say who came how far; seeds: those of the space."""
    from kizzasi.nas.pipelines import search_report, write_search_report

    per_step = args.seq_len * args.batch_size
    report = search_report(found.summary, per_step, args.seq_len, n_breadth)
    path = write_search_report(found.folder, report)
    files = zip(seeds, _seeds(args).values(), strict=True)
    names = {spec.digest[:12]: file for spec, file in files}
    head = ["configuration", "parameters", "stages", found.summary.metric.label, "steps", "QPC"]
    rows = [
        [
            names.get(row["id"], row["name"]),
            f"{row['params']:,}",
            str(row["stages"]),
            f"{row['best_score']:.3f}",
            str(row["best_steps"]),
            "-" if row["qpc"] is None else f"{row['qpc']:.2e}",
            "-" if row["tokens_per_sec"] is None else f"{row['tokens_per_sec']:,.0f}",
        ]
        for row in report["candidates"]
        if row["best_score"] is not None
    ]
    shown = (markdown if args.markdown else columns)([[*head, "tokens/s"], *rows])
    best = found.best
    result = {
        "folder": str(found.folder),
        "report": str(path),
        "best": str(found.folder / "best"),
        "name": best.name,
        "params": best.params,
        "score": best.score,
        "searched": best.searched,
        "stages_reached": max((row["stages"] for row in report["candidates"]), default=0),
    }
    return result, f"{shown}\n\n{found.table}\n{path}\n{found.folder / 'best'}"
