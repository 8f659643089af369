"""Decoding speed of `model.step` beside transformers' `generate`, same shapes, one run.

4 layers, d_model 256, vocabulary 256, batch 1, prompt 16, float32. First the tokens of the
recurrent form are checked against the parallel form; no ratio is printed unless they are equal.

example:
  python scripts/bench_decode.py --tokens 128 --repeats 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kizzasi.models import BlockSpec, ModelSpec, SequenceModel, Tokens, build_model
from kizzasi.models.channels import RWKVChannelSpec, SwiGLUSpec
from kizzasi.models.mixers import AttentionSpec, MambaSpec, RWKV7Spec

VOCAB, D_MODEL, LAYERS, PROMPT = 256, 256, 4, 16
BLOCKS = {
    "llama": BlockSpec(AttentionSpec(n_heads=8), SwiGLUSpec(hidden=688)),
    "mamba": BlockSpec(MambaSpec()),
    "rwkv7": BlockSpec(RWKV7Spec(), RWKVChannelSpec(), norm="layer"),
}


def peer(name: str) -> Callable[[Tensor, int], Tensor] | None:
    """Greedy `generate` of the transformers model of the same shape, or None without a peer."""
    try:
        import transformers
    except ImportError:
        sys.exit("the peer is missing: pip install transformers")

    sizes = {"vocab_size": VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": LAYERS}
    no_ids = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    shapes: dict[str, tuple[str, dict[str, int]]] = {
        "llama": ("Llama", {"intermediate_size": 688, "num_attention_heads": 8}),
        "mamba": ("Mamba", {"state_size": 16}),
    }
    if name not in shapes:
        return None
    family, own = shapes[name]
    config = getattr(transformers, f"{family}Config")(**sizes, **no_ids, **own)
    model: Any = getattr(transformers, f"{family}ForCausalLM")(config).eval()

    def run(prompt: Tensor, n: int) -> Tensor:
        with torch.no_grad():
            return model.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False)

    return run


def check(model: SequenceModel, prompt: Tensor) -> None:
    """Greedy tokens by steps must be the argmax of one parallel pass."""
    out = model.generate(prompt, 48, temperature=0)
    logits = model(out).logits[:, PROMPT - 1 : -1]
    chosen = logits.gather(-1, out[:, PROMPT:, None])[..., 0]
    if (logits.amax(-1) - chosen).max() > 1e-4:
        sys.exit("the recurrent form differs from the parallel form; no speed is printed")


def rate(run: Callable[[], object], n_tokens: int) -> float:
    start = time.perf_counter()
    run()
    return n_tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(args.seed)
    prompt = torch.randint(VOCAB, (1, PROMPT), generator=generator).to(args.device)
    rows = []
    for name, block in BLOCKS.items():
        spec = ModelSpec(D_MODEL, (block,) * LAYERS, Tokens(VOCAB))
        model = build_model(spec, seed=args.seed, device=args.device).eval()
        check(model, prompt)
        runs = {"ours": partial(model.generate, prompt, args.tokens, temperature=0)}
        if other := peer(name):
            runs["transformers"] = partial(other, prompt, args.tokens)
        rates: dict[str, list[float]] = {key: [] for key in runs}
        for _ in range(args.repeats + 1):  # in turn, so that both meet the same machine
            for key, run in runs.items():
                rates[key].append(rate(run, args.tokens))
        row = {"model": name, **{k: statistics.median(v[1:]) for k, v in rates.items()}}
        if other:
            row["ratio"] = row["ours"] / row["transformers"]
        rows.append(row)
    if args.json:
        print(json.dumps(rows))
        return
    print("tokens/s, medians; the first of each is warm-up")
    for row in rows:
        print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else v for k, v in row.items()))


if __name__ == "__main__":
    main()
