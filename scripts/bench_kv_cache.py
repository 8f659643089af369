"""What codes of keys and values cost and save: bytes, perplexity and speed beside float16's.

Every policy runs on the same weights, text and machine; perplexity is of whole windows, the codes
seen as in decoding, with the standard error of the tokens' changes. Speed is processor time of
single tokens of a `Decoder` after a prompt, the policies taking turns; "nf4-tokens" codes keys
token by token, "nf4" by channel.

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
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kizzasi.models import SequenceModel, Tokens, load
from kizzasi.models.checkpoints.tokenizers import load_tokenizer
from kizzasi.models.decoding.decoder import Decoder
from kizzasi.models.ops.kv_codes import KVQuant

POLICIES = ("none", "int8", "fp8", "nf4", "nf4-tokens")


def text_of(args: argparse.Namespace) -> str:
    if args.text is not None:
        return args.text.read_text()
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def policy(model: SequenceModel, name: str, args: argparse.Namespace) -> SequenceModel:
    """The model with a cache of this name."""
    kind, _, by = name.partition("-")
    how: dict[str, Any] = {"window": args.cache_window, "n_global": args.cache_first}
    how["group"] = 0 if by else args.cache_group if kind != "none" else None
    return model.with_cache(cast("KVQuant", kind), **how)


@torch.no_grad()
def nats(model: SequenceModel, windows: Tensor) -> Tensor:
    """Cross entropy of every token."""
    losses = [
        F.cross_entropy(model(row[None, :-1]).logits[0], row[1:], reduction="none")
        for row in windows
    ]
    return torch.cat(losses)


@torch.no_grad()
def seconds_a_token(models: dict[str, SequenceModel], row: Tensor, n: int) -> dict[str, float]:
    """Medians of single steps after a prompt, the policies taking turns."""
    decoders = {name: Decoder(model) for name, model in models.items()}
    taken: dict[str, list[float]] = {name: [] for name in models}
    for decoder in decoders.values():
        decoder.read(row[None])
        decoder.step(row[:1])
    for _ in range(n):
        for name, decoder in decoders.items():
            start = time.process_time()
            decoder.step(row[:1])
            taken[name].append(time.process_time() - start)
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
    parser.add_argument("--context", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument("--cache-group", type=int, help="as of with_cache")
    parser.add_argument("--cache-window", type=int, default=8192)
    parser.add_argument("--cache-first", type=int, default=4)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load(args.model)
    assert isinstance(model.spec.stem, Tokens), "a model of text"
    tokenizer = load_tokenizer(args.model, model.spec.stem.vocab_size)
    n = max(args.windows * args.window, args.context)
    ids = torch.tensor(tokenizer.encode(text_of(args)[: 12 * n])[:n])
    windows = ids[: args.windows * args.window].view(-1, args.window)
    models = {name: policy(model, name, args) for name in args.policies}
    speed: dict[str, float] = {}
    if args.steps:
        speed = seconds_a_token(models, ids[: args.context], args.steps)
    plain = policy(model, "none", args)
    full = nats(plain, windows) if args.windows else torch.zeros(0)
    # float16: half of float32's keys and values, with the positions of the same ring
    ring = plain.init_state(1)
    places = sum(block.mixer.position.nbytes for block in ring.blocks)
    half = (ring.nbytes - places) / 2 + places
    for name, each in models.items():
        row: dict[str, Any] = {"cache": name}
        row["bytes_of_float16"] = round(each.init_state(1).nbytes / half, 4)
        if args.windows:
            change = nats(each, windows) - full
            row["perplexity_change"] = round(math.expm1(change.mean().item()), 5)
            row["standard_error"] = round(change.std().item() / len(change) ** 0.5, 5)
        if args.steps:
            row["cpu_ms_a_token"] = round(1e3 * speed[name], 2)
            row["time_of_first"] = round(speed[name] / speed[next(iter(speed))], 3)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
