"""Train a spec from scratch, or a checkpoint further, on text, token ids, signals or labels.

example:
  kizzasi train my_model.yaml --data ~/notes --steps 2000 --out runs/notes

on several GPUs, and on several machines with torchrun's own options:
  torchrun --nproc-per-node 8 scripts/train.py my_model.yaml --device cuda --parallel fsdp
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kizzasi.cli.common import check_device, is_spec_file, read_spec
from kizzasi.errors import DataError, SpecError, StudyError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", help="a .yaml or .json file, or a checkpoint to go on from")
    parser.add_argument(
        "--data",
        help='text (a file, a folder or "stdlib"), ids (.npy, .bin), frames (.csv, .npy, .wav) '
        "or labelled sequences (.npz); default: text that is built in",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, default=1000, help="optimiser steps (default 1000)")
    budget.add_argument("--tokens", type=int, help="the budget in tokens instead of steps")
    parser.add_argument("--seq-len", type=int, default=256, help="window in tokens (default 256)")
    parser.add_argument("--batch-size", type=int, default=16, help="windows a step (default 16)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (default 3e-3)")
    parser.add_argument("--out", default="runs/train", help="folder (default runs/train)")
    parser.add_argument("--resume", action="store_true", help="go on after an interruption")
    parser.add_argument(
        "--save-every", type=int, default=200, help="steps between checkpoints (default 200)"
    )
    parser.add_argument(
        "--parallel", choices=("ddp", "fsdp"), default="ddp", help="under torchrun (default ddp)"
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from tqdm import tqdm

    from kizzasi.cli.torchrun import join, leave, restarted
    from kizzasi.models import build_model, load
    from kizzasi.models.checkpoints import companions_of, save
    from kizzasi.train.bytes import ByteText
    from kizzasi.train.leak import find_leak
    from kizzasi.train.open import open_task
    from kizzasi.train.recipe import Recipe
    from kizzasi.train.trainer import Training

    if args.save_every < 1:
        raise SpecError(f"--save-every {args.save_every}: must be at least 1")
    ranks, device = join(args.device, args.parallel)
    check_device(device)
    tokens = args.steps * args.seq_len * args.batch_size if args.tokens is None else args.tokens
    recipe = Recipe(tokens, seq_len=args.seq_len, batch_size=args.batch_size, lr=args.lr)
    recipe.check()
    task, like = open_task(args.data), None
    if is_spec_file(args.spec):
        model = build_model(read_spec(args.spec), seed=args.seed, device=device)
    else:
        like = args.spec
        if isinstance(task, ByteText) and companions_of(Path(like)).files:
            raise DataError(
                f"{like}: it reads the ids of its tokenizer, and the data are bytes; give ids made "
                "with that tokenizer (--data ids.npy or ids.bin)"
            )
        model = load(like, device=device)
    if leak := find_leak(model):
        raise StudyError(f"{args.spec}: {leak}")
    training = Training(model, task, recipe, args.seed, ranks)
    folder = Path(args.out)
    state = folder / "training.pt"
    folder.mkdir(parents=True, exist_ok=True)
    if state.exists():
        if not (args.resume or restarted()):
            raise StudyError(f"{state}: an unfinished training; use --resume or another --out")
        training.restore(state)
    options: dict[str, Any] = {"unit": "tok", "unit_scale": True, "disable": ranks.rank > 0}
    with tqdm(total=tokens, initial=training.tokens, **options) as bar:

        def on_step(n: int) -> None:
            bar.update(n)
            if training.step % args.save_every == 0:
                training.save(state)

        try:
            failure = training.run(tokens, on_step)
        except KeyboardInterrupt:
            if ranks.world == 1:  # several processes are seldom stopped at the same step
                training.save(state)
            raise
    if failure:
        raise StudyError(failure)
    score, beside = training.score(), task.baselines()
    whole = ranks.whole(model)
    leave(ranks)
    save(whole.eval(), folder, overwrite=True, like=like)
    state.unlink(missing_ok=True)
    result = {
        "folder": str(folder),
        "metric": task.metric.name,
        "score": score,
        "baselines": beside,
        "recipe": asdict(recipe),
        "curve": training.curve,
    }
    others = ", ".join(f"{name} {bits:.3f}" for name, bits in beside.items())
    return result, f"{folder}: {score:.4f} {task.metric.label} held out ({others})"
