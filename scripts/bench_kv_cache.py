"""What codes of keys and values cost and save: bytes, perplexity and speed beside float16's.

Every policy runs on the same weights, text and machine; perplexity is of whole windows, the codes
seen as in decoding, speed of single tokens after a prompt, interleaved with full precision.

example:
  python scripts/bench_kv_cache.py SmolLM2-135M-Instruct.Q4_1.gguf --windows 2 --window 512
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kizzasi.models import SequenceModel, Tokens, load
from kizzasi.models.checkpoints.tokenizers import load_tokenizer

POLICIES = ("none", "int8", "fp8", "nf4")


def text_of(args: argparse.Namespace) -> str:
    if args.text is not None:
        return args.text.read_text()
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


@torch.no_grad()
def nats(model: SequenceModel, windows: Tensor) -> float:
    """Cross entropy of a token."""
    losses = [model(row[None, :-1]).loss(row[None, 1:]).item() for row in windows]
    return statistics.mean(losses)


@torch.no_grad()
def seconds_a_token(models: dict[str, SequenceModel], row: Tensor, n: int) -> dict[str, float]:
    """Medians of single steps, the policies taking turns."""
    states = {name: model(row[None]).state for name, model in models.items()}
    taken: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(n):
        for name, model in models.items():
            start = time.perf_counter()
            states[name] = model.step(row[:1], states[name]).state
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a checkpoint folder or a .gguf file")
    parser.add_argument("--text", type=Path, help="a text file (default: Python's manual)")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--window", type=int, default=512, help="tokens of one")
    parser.add_argument("--steps", type=int, default=20, help="tokens timed of each policy")
    parser.add_argument("--cache-window", type=int, default=8192)
    parser.add_argument("--cache-first", type=int, default=4)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load(args.model)
    assert isinstance(model.spec.stem, Tokens), "a model of text"
    tokenizer = load_tokenizer(args.model, model.spec.stem.vocab_size)
    n = args.windows * args.window
    ids = torch.tensor(tokenizer.encode(text_of(args)[: 12 * n])[:n])
    windows = ids[: len(ids) // args.window * args.window].view(-1, args.window)
    how = {"window": args.cache_window, "n_global": args.cache_first}
    models = {name: model.with_cache(name, **how) for name in args.policies}
    speed = seconds_a_token(models, windows[0], args.steps)
    full = nats(model, windows)
    # float16: half of float32's keys and values, with the positions of the same ring
    ring = model.with_cache(**how).init_state(1)
    places = sum(block.mixer.position.nbytes for block in ring.blocks)
    half = (ring.nbytes - places) / 2 + places
    for name, each in models.items():
        row: dict[str, Any] = {
            "cache": name,
            "bytes_of_float16": round(each.init_state(1).nbytes / half, 4),
            "perplexity_change": round(math.expm1(nats(each, windows) - full), 5),
            "ms_a_token": round(1e3 * speed[name], 2),
            "time_of_none": round(speed[name] / speed[next(iter(speed))], 3),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
