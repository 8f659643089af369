"""Prefill and decoding speed beside transformers: the same weights, shapes and machine, one run.

4 layers, d_model 256, vocabulary 256, batch 1, float32. Each peer is saved by transformers and
loaded by `kizzasi.models.load`; its logits, and the greedy tokens that follow, are compared first,
and no ratio is printed unless they agree.

With --far N, of the recurrent models alone: what a token costs after N tokens of one line, against
what it cost after 100 (medians of 64 tokens).

examples:
  python scripts/bench_decode.py --tokens 128 --prefill 512 --repeats 5
  python scripts/bench_decode.py --threads 1 --cpu-time        where other programs run too
  python scripts/bench_decode.py --far 32000
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kizzasi.models import Decoder, SequenceModel, load

SIZES = {"vocab_size": 256, "hidden_size": 256, "num_hidden_layers": 4}
NO_IDS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
HEADS = {"intermediate_size": 688, "num_attention_heads": 8, "num_key_value_heads": 8}
PEERS: dict[str, dict[str, Any]] = {
    "llama": HEADS,
    "mamba": {"state_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 64, "state_size": 64, "n_groups": 1, "chunk_size": 64},
    "rwkv": {"attention_hidden_size": 256, "intermediate_size": 1024, "context_length": 4096},
    "mixtral": {**HEADS, "intermediate_size": 344, "num_local_experts": 4},
}
RECURRENT = ("mamba", "mamba2", "rwkv")
PROMPT = 16
NEAR, SAMPLE = 100, 64
Clock = Callable[[], float]


def pair(name: str, device: str) -> tuple[Any, SequenceModel]:
    """A random model of transformers, and ours with its weights."""
    try:
        import transformers
    except ImportError:
        sys.exit("the peers are missing: pip install transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.for_model(name, **{**SIZES, **NO_IDS, **PEERS[name]})
    peer = transformers.AutoModelForCausalLM.from_config(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        return peer.to(device), load(folder, device=device)


@torch.no_grad()
def check(name: str, peer: Any, model: SequenceModel, prompt: Tensor) -> None:
    """Exits unless both give the same logits, and our steps agree with our parallel form."""
    off = (peer(prompt).logits - model(prompt).logits).abs().max()
    out = model.generate(prompt[:, :PROMPT], 48, temperature=0)
    logits = model(out).logits[:, PROMPT - 1 : -1]
    chosen = logits.gather(-1, out[:, PROMPT:, None])[..., 0]
    if off > 1e-4 or (logits.amax(-1) - chosen).max() > 1e-4:
        sys.exit(f"{name}: the logits differ by {off:.1e}; no speed is printed")


@torch.no_grad()
def rate(run: Callable[[], object], n_tokens: int, clock: Clock) -> float:
    start = clock()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return n_tokens / (clock() - start)


def measure(
    runs: dict[str, Callable[[], object]], n_tokens: int, repeats: int, clock: Clock
) -> dict[str, float]:
    """Median tokens/s, in turn, so that both meet the same machine; the first is warm-up."""
    rates: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(repeats + 1):
        for key, run in runs.items():
            rates[key].append(rate(run, n_tokens, clock))
    return {key: statistics.median(values[1:]) for key, values in rates.items()}


def far(model: SequenceModel, n: int, clock: Clock) -> dict[str, float]:
    """Median microseconds of the SAMPLE tokens after NEAR and after n tokens of one line."""
    decoder, seconds = Decoder(model), []
    tokens = torch.randint(256, (n + SAMPLE, 1))
    for token in tokens:
        start = clock()
        decoder.step(token)
        seconds.append(clock() - start)
    near, late = (1e6 * statistics.median(seconds[i : i + SAMPLE]) for i in (NEAR, n))
    return {f"us at {NEAR}": near, f"us at {n}": late, "ratio": late / near}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--tokens", type=int, default=128, help="decoded after a prompt of 16")
    parser.add_argument("--prefill", type=int, default=512, help="tokens read at once")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument(
        "--compile", action="store_true", help="decode by torch.compile(model.step)"
    )
    parser.add_argument("--cpu-time", action="store_true", help="of this process, not of the clock")
    parser.add_argument("--far", type=int, metavar="N", help="compare token N with token 100")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    long = torch.randint(256, (1, args.prefill), device=args.device)
    prompt = long[:, :PROMPT]
    clock: Clock = time.process_time if args.cpu_time else time.perf_counter
    rows: list[dict[str, Any]] = []
    for name in args.models:
        if args.far and name not in RECURRENT:
            continue
        peer, model = pair(name, args.device)
        check(name, peer, model, long)
        if args.far:
            rows.append({"model": name, **far(model, args.far, clock)})
            continue
        n = {"max_new_tokens": args.tokens}
        step = torch.compile(model.step, dynamic=True) if args.compile else None
        theirs = partial(peer.generate, prompt, min_new_tokens=args.tokens, do_sample=False, **n)
        tasks = {
            "decode": (
                {"ours": partial(model.generate, prompt, temperature=0, step=step, **n)},
                theirs,
            ),
            "prefill": ({"ours": partial(model, long)}, partial(peer, long, use_cache=True)),
        }
        for task, (runs, other) in tasks.items():
            n_tokens = args.tokens if task == "decode" else args.prefill
            found = measure({**runs, "transformers": other}, n_tokens, args.repeats, clock)
            ratio = found["ours"] / found["transformers"]
            rows.append({"model": name, "task": task, **found, "ratio": ratio})
    if args.json:
        print(json.dumps({"threads": torch.get_num_threads(), "rows": rows}))
        return
    times = " of processor time" if args.cpu_time else ""
    print(f"tokens/s{times}, medians of {args.repeats}, {torch.get_num_threads()} threads")
    for row in rows:
        print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else v for k, v in row.items()))


if __name__ == "__main__":
    main()
