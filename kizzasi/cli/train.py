"""Train a spec from scratch, or a checkpoint further, on text, token ids, signals or labels.

example:
  kizzasi train my_model.yaml --data ~/notes --steps 2000 --out runs/notes
  kizzasi train --resume --out runs/notes     # after an interruption; knows its own settings

on several GPUs, and on several machines with torchrun's own options:
  torchrun --nproc-per-node 8 scripts/train.py my_model.yaml --device cuda --parallel fsdp
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kizzasi.cli.common import (
    SCORE_WINDOWS,
    add_engine,
    check_device,
    check_numbers,
    checkpoint_of,
    is_pipeline_file,
    is_spec_file,
    read_spec,
    scoring,
)
from kizzasi.errors import DataError, SpecError, StudyError
from kizzasi.files import BusyError, clear_partial, only_writer, write_text
from kizzasi.progress import Line

if TYPE_CHECKING:
    from kizzasi.models import ModelSpec, SequenceModel
    from kizzasi.train.distributed import Parallel, Ranks
    from kizzasi.train.task import Task
    from kizzasi.train.trainer import Training

STATE, CONFIG, JOURNAL = "training.pt", "config.json", "journal.jsonl"
# What a resumed training takes from its checkpoint where no flag says otherwise.
HELD = ("spec", "data", "steps", "tokens", "seq_len", "batch_size", "lr", "optimizer", "seed")
OF_PIPELINES = ("weight_decay", "clip")  # no flags; the recipe's own unless a pipeline says them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "spec", nargs="?", help="a .yaml or .json file, or a checkpoint to go on from"
    )
    add_engine(parser)
    parser.add_argument(
        "--data",
        help='text (a file, a folder or "stdlib"), ids (.npy, .bin), frames (.csv, .npy, .wav) '
        "or labelled sequences (.npz); default for a new model: builtin, a text of Python's",
    )
    parser.add_argument("--out", default="runs/train", help="folder (default runs/train)")
    parser.add_argument("--resume", action="store_true", help="go on after an interruption")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in --out")
    recipe = parser.add_argument_group("recipe")
    budget = recipe.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, default=1000, help="optimiser steps (default 1000)")
    budget.add_argument("--tokens", type=int, help="the budget in tokens instead of steps")
    recipe.add_argument("--seq-len", type=int, default=256, help="window in tokens (default 256)")
    recipe.add_argument("--batch-size", type=int, default=16, help="windows a step (default 16)")
    recipe.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (default 3e-3)")
    recipe.add_argument(
        "--optimizer", choices=("adamw", "muon"), default="adamw", help="default adamw"
    )
    more = parser.add_argument_group("saving, scoring and several processes")
    more.add_argument(
        "--save-every", type=int, default=200, help="steps between checkpoints (default 200)"
    )
    more.add_argument(
        "--score-windows",
        type=int,
        default=SCORE_WINDOWS,
        help=f"held-out windows that the score uses (default {SCORE_WINDOWS}; 0 for all)",
    )
    more.add_argument(
        "--parallel", choices=("ddp", "fsdp"), default="ddp", help="under torchrun (default ddp)"
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    check_numbers(args, "save_every", "seq_len", "batch_size", "steps")
    with Line("train", hidden=os.environ.get("RANK", "0") != "0") as line:
        line.say("starting")
        args.resume = args.resume or _restarted()
        ranks, args.device = _join(args.device, args.parallel)
        check_device(args.device)
        return _run(args, ranks, line)


def _run(args: argparse.Namespace, ranks: Ranks, line: Line) -> tuple[dict[str, Any], str]:
    from kizzasi.models.checkpoints import save
    from kizzasi.train.bytes import baselines_of

    with _claimed(Path(args.out), args, writes=ranks.rank == 0) as folder:
        state = folder / STATE
        line.say("reading the data")
        wanted = _wanted(args, state)
        training = _prepared(wanted, args, ranks, line)
        _train(training, wanted.tokens, args, state, line)
        line.say("saving")
        whole = ranks.whole(training.model)
        if ranks.rank == 0:
            save(whole.eval(), folder, overwrite=True, like=wanted.like)
            state.unlink(missing_ok=True)
        score = _score(training, args, line)
        beside = baselines_of(training.task, line)
        _leave(ranks)
    metric = training.task.metric
    result = {
        "folder": str(folder),
        "metric": metric.name,
        "score": score,
        "baselines": beside,
        "recipe": asdict(training.recipe),
        "curve": training.curve,
    }
    others = ", ".join(f"{name} {bits:.3f}" for name, bits in beside.items())
    return result, f"{folder}: {score:.4f} {metric.label} held out ({others})"


@contextmanager
def _claimed(folder: Path, args: argparse.Namespace, *, writes: bool) -> Iterator[Path]:
    """Hold the folder alone and see that it can be written. A refusal leaves no folder behind.

    Raises:
        StudyError: it holds another model, a search or an unfinished training, or another process.
    """
    unfinished = (folder / STATE).exists() or (folder / STATE).is_symlink()
    finished = (folder / CONFIG).exists()
    if (folder / JOURNAL).exists():
        raise StudyError(f"{folder}: holds a search; choose another --out")
    if args.resume and not unfinished and (finished or args.spec is None):
        raise StudyError(f"{folder}: no unfinished training is there; nothing to resume")
    if unfinished and not args.resume:
        raise StudyError(f"{folder / STATE}: an unfinished training; use --resume or another --out")
    further = args.spec is not None and Path(args.spec).resolve() == folder.resolve()
    if finished and not (args.overwrite or args.resume or further):
        raise StudyError(f"{folder}: holds a model; use --overwrite or another --out")
    if (folder / STATE).is_symlink():
        raise StudyError(f"{folder / STATE}: a link; a training keeps to its own folder")
    if not writes:
        yield folder
        return
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with only_writer(folder):
            clear_partial(folder)
            probe = folder / ".kizzasi"
            write_text(probe, "")
            probe.unlink()
            yield folder
    except BusyError:
        raise StudyError(
            f"{folder}: another process is training there; wait for it or choose another --out"
        ) from None
    finally:
        for place in made:
            with suppress(OSError):
                place.rmdir()  # those that hold something stay


@dataclass(frozen=True)
class _Wanted:
    """What to train: settings as given, or else as the checkpoint has them."""

    values: Mapping[str, Any]
    saved: Mapping[str, Any] | None  # the checkpoint to go on from

    @property
    def tokens(self) -> int:
        own = self.values
        if own["tokens"] is not None:
            return own["tokens"]
        return own["steps"] * own["seq_len"] * own["batch_size"]

    @property
    def like(self) -> str | None:
        """The checkpoint whose tokenizer goes along, where it is still there."""
        source = self.values["spec"]
        if source is None or is_spec_file(source) or not Path(source).exists():
            return None
        return checkpoint_of(source)


def _wanted(args: argparse.Namespace, state: Path) -> _Wanted:
    from kizzasi.train.recipe import Recipe
    from kizzasi.train.trainer import read_training

    if args.spec is not None and not is_spec_file(args.spec):
        args.spec = args.given["spec"] = checkpoint_of(args.spec)
    given = {name: getattr(args, name) for name in HELD}
    given |= {name: getattr(Recipe(1), name) for name in OF_PIPELINES}
    if not state.exists():
        if args.spec is None:
            raise SpecError("give a spec or a checkpoint to train; see kizzasi train --help")
        told = _of_pipeline(args.spec)
        return _Wanted({**given, **{k: v for k, v in told.items() if k not in args.given}}, None)
    saved = read_training(state, args.device)
    told = saved.get("notes")
    told = told.get("arguments") if isinstance(told, Mapping) else None
    if not isinstance(told, Mapping):
        if args.spec is None:
            raise StudyError(f"{state}: does not say what it trains; give the spec and all options")
        return _Wanted(given, saved)
    typed = {name: args.given[name] for name in HELD if name in args.given}
    if "steps" in typed or "tokens" in typed:
        told = {**told, "steps": 1000, "tokens": None}
    held = (*HELD, *OF_PIPELINES)
    return _Wanted({**given, **{k: told[k] for k in held if k in told}, **typed}, saved)


def _of_pipeline(source: str) -> Mapping[str, Any]:
    """The settings of training that a pipeline says; {} of anything else."""
    if not is_pipeline_file(source):
        return {}
    from kizzasi.nas.pipelines import Pipeline

    return Pipeline.from_file(source).recipe


def _prepared(wanted: _Wanted, args: argparse.Namespace, ranks: Ranks, line: Line) -> Training:
    """Everything that can be refused is, before the first step."""
    from kizzasi.train.bytes import ByteText
    from kizzasi.train.files import said_of
    from kizzasi.train.frames import Frames
    from kizzasi.train.leak import find_leak
    from kizzasi.train.memory import require_memory
    from kizzasi.train.open import open_task
    from kizzasi.train.recipe import Recipe
    from kizzasi.train.seeds import derive_seed
    from kizzasi.train.trainer import Training

    own = wanted.values
    shape = {
        name: own[name] for name in ("seq_len", "batch_size", "lr", "optimizer", *OF_PIPELINES)
    }
    recipe = Recipe(wanted.tokens, score_windows=args.score_windows or None, **shape)
    recipe.check()
    spec = _spec(wanted, args)
    require_memory(spec, recipe, args.device, ranks=ranks)
    task = open_task(own["data"], apart=Path(args.out))
    _require_ids(wanted, task)
    model = _model(wanted, spec, args)
    if leak := find_leak(model):
        raise StudyError(f"{own['spec']}: {leak}")
    of_old = wanted.saved is not None and "identity" not in wanted.saved
    data_seed = own["seed"] if of_old else derive_seed(own["seed"], "data")
    training = Training(model, task, recipe, data_seed, ranks)
    training.notes = {"arguments": dict(own), "spec": model.spec.canonical_json()}
    if wanted.saved is not None:
        training.restore(Path(args.out) / STATE, wanted.saved)
        before = wanted.saved.get("identity", {}).get("horizon", wanted.tokens)
        if before < wanted.tokens:
            line.write(f"more tokens: {wanted.tokens:,} instead of {before:,}")
    if isinstance(task, (ByteText, Frames)) and task.left_out and ranks.rank == 0:
        line.write(f"{own['data']}: {said_of(task.left_out)}")
    return training


def _spec(wanted: _Wanted, args: argparse.Namespace) -> ModelSpec:
    """What to train. Raises DataError for a checkpoint without data to train it on."""
    source = wanted.values["spec"]
    if wanted.saved is not None and "spec" not in args.given:
        return _noted_spec(wanted.saved)
    if not is_spec_file(source) and wanted.values["data"] is None:
        raise DataError(
            f"{source}: give --data to train a checkpoint further ('builtin' for Python's text)"
        )
    return read_spec(source)


def _require_ids(wanted: _Wanted, task: Task) -> None:
    """Raises DataError where a checkpoint reads ids of a tokenizer, and the data are bytes."""
    from kizzasi.models.checkpoints import companions_of
    from kizzasi.train.bytes import ByteText

    if isinstance(task, ByteText) and wanted.like and companions_of(Path(wanted.like)).files:
        raise DataError(
            f"{wanted.like}: it reads the ids of its tokenizer, and the data are bytes; give ids "
            "made with that tokenizer (--data ids.npy or ids.bin)"
        )


def _model(wanted: _Wanted, spec: ModelSpec, args: argparse.Namespace) -> SequenceModel:
    """The model to train, as it is before the first step; a resumed one gets its numbers later."""
    from kizzasi.models import build_model, load

    source, how = wanted.values["spec"], {"device": args.device, "engine": args.engine}
    if wanted.saved is None and not is_spec_file(source):
        return load(source, **how)
    return build_model(spec, seed=wanted.values["seed"], **how)


def _noted_spec(saved: Mapping[str, Any]) -> ModelSpec:
    import json

    from kizzasi.errors import CheckpointError
    from kizzasi.models import ModelSpec

    try:
        return ModelSpec.from_dict(json.loads(saved["notes"]["spec"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{STATE}: its spec is damaged: {error!s:.200}") from error


def _train(
    training: Training, tokens: int, args: argparse.Namespace, state: Path, line: Line
) -> None:
    metric = training.task.metric
    unit = f" {metric.label}" if metric.of_loss else ""
    line.count_to(tokens, training.tokens)

    def on_step(n: int) -> None:
        told = f", loss {training.curve[-1][1]:.3f}{unit}" if training.curve else ""
        line.say(f"step {training.step:,}{told}", now=False)
        line.update(n)
        if training.step % args.save_every == 0:
            training.save(state)

    try:
        failure = training.run(tokens, on_step)
    except KeyboardInterrupt:
        if training.ranks.world == 1:  # several processes are seldom stopped at the same step
            training.save(state)
        raise
    if failure:
        raise StudyError(failure)


def _score(training: Training, args: argparse.Namespace, line: Line) -> float:
    with scoring(line, training.model, args.score_windows, training.recipe.batch_size):
        return training.score()


def _join(device: str, how: Parallel) -> tuple[Ranks, str]:
    """Meet the others, if torchrun started this process.

    Args:
        device: "cpu" (gloo) or "cuda" (NCCL, the GPU of this process's local rank).

    Returns:
        This process's place, and its device.
    """
    from kizzasi.train.distributed import ALONE, Ranks

    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE, device
    import torch
    import torch.distributed as dist

    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    beside = int(os.environ["LOCAL_WORLD_SIZE"])
    return Ranks(dist.get_rank(), dist.get_world_size(), how, beside), device


def _restarted() -> bool:
    """torchrun started this process anew after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _leave(ranks: Ranks) -> None:
    """Part from the others; all but the first end here, their work being done."""
    if ranks.world > 1:
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()
        if ranks.rank:
            raise SystemExit(0)
