"""Train a spec from scratch, or a checkpoint further, on any bytes.

example:
  kizzasi train my_model.yaml --data ~/notes --steps 2000 --out runs/notes
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kizzasi.cli.common import check_device, read_spec
from kizzasi.errors import StudyError

SAVE_SECONDS = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", help="a .yaml or .json file, or a checkpoint folder to go on from")
    parser.add_argument("--data", help='a file or folder of bytes, or "stdlib"; default: built in')
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps (default 1000)")
    parser.add_argument("--seq-len", type=int, default=256, help="window in tokens (default 256)")
    parser.add_argument("--batch-size", type=int, default=16, help="windows a step (default 16)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (default 3e-3)")
    parser.add_argument("--out", default="runs/train", help="folder (default runs/train)")
    parser.add_argument("--resume", action="store_true", help="go on after an interruption")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from tqdm import tqdm

    from kizzasi.models import build_model, load
    from kizzasi.nas.data import baselines, load_corpus
    from kizzasi.nas.leak import find_leak
    from kizzasi.nas.microtrain import Recipe, Training

    check_device(args.device)
    tokens = args.steps * args.seq_len * args.batch_size
    recipe = Recipe(tokens, seq_len=args.seq_len, batch_size=args.batch_size, lr=args.lr)
    recipe.check()
    corpus = load_corpus(args.data)
    if Path(args.spec).is_dir():
        model = load(args.spec, device=args.device)
    else:
        model = build_model(read_spec(args.spec), seed=args.seed, device=args.device)
    if leak := find_leak(model):
        raise StudyError(f"{args.spec}: {leak}")
    training = Training(model, corpus, recipe, args.seed)
    folder = Path(args.out)
    state = folder / "training.pt"
    folder.mkdir(parents=True, exist_ok=True)
    if state.exists():
        if not args.resume:
            raise StudyError(f"{state}: an unfinished training; use --resume or another --out")
        training.restore(state)
    saved = time.monotonic()
    with tqdm(total=tokens, initial=training.tokens, unit="tok", unit_scale=True) as bar:

        def on_step(n: int) -> None:
            nonlocal saved
            bar.update(n)
            if time.monotonic() - saved > SAVE_SECONDS:
                training.save(state)
                saved = time.monotonic()

        try:
            failure = training.run(tokens, on_step)
        except KeyboardInterrupt:
            training.save(state)
            raise
    if failure:
        raise StudyError(failure)
    model.eval().save_pretrained(folder)
    score, beside = training.score(), baselines(corpus)
    if state.exists():
        os.remove(state)
    result = {
        "folder": str(folder),
        "bits_per_byte": score,
        "baselines": beside,
        "recipe": asdict(recipe),
        "curve": training.curve,
    }
    others = ", ".join(f"{name} {bits:.3f}" for name, bits in beside.items())
    return result, f"{folder}: {score:.4f} bits/byte held out ({others})"
