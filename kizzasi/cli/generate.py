"""Continue a text with a byte-level model.

example:
  kizzasi generate runs/first/best --prompt "def " --tokens 200 --temperature 0.8
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from kizzasi.cli.common import check_device
from kizzasi.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a checkpoint folder")
    parser.add_argument("--prompt", default="\n", help="text to continue (default: a new line)")
    parser.add_argument("--tokens", type=int, default=200, help="how many to add (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, help="sample among the k likeliest")
    parser.add_argument("--top-p", type=float, help="sample among the likeliest p of probability")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    import torch

    from kizzasi.models import Tokens, load

    check_device(args.device)
    model = load(args.model, device=args.device)
    prompt = args.prompt.encode()
    stem = model.spec.stem
    if not prompt:
        raise DataError("--prompt: empty; give at least one character")
    if not isinstance(stem, Tokens) or max(prompt) >= stem.vocab_size:
        raise DataError(f"{args.model}: not a model of bytes, or the prompt has bytes it lacks")
    ids = torch.tensor(list(prompt), device=args.device)
    start = time.perf_counter()
    out = model.generate(
        ids,
        args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    seconds = time.perf_counter() - start
    text = bytes(min(i, 255) for i in out.tolist()).decode("utf-8", errors="replace")
    rate = (len(out) - len(prompt)) / seconds
    return {"text": text, "tokens_per_second": rate}, text
