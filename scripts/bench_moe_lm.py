"""A mixture-of-experts language model beside its dense twin: equal active parameters and tokens.

Both are small Transformers on bytes; the dense one has SwiGLUs of width `hidden`, the other 8
experts of half that width of which each byte uses two. Scores are bits/byte on held-out text.

example:
  python scripts/bench_moe_lm.py --tokens 400000 --seeds 3
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
from tqdm import tqdm

from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.channels import MoESpec, SwiGLUSpec
from kizzasi.models.mixer import ChannelSpec
from kizzasi.models.mixers import AttentionSpec
from kizzasi.train import Recipe, Training, load_corpus

D_MODEL, LAYERS, HIDDEN = 96, 3, 256
CHANNELS: dict[str, ChannelSpec] = {
    "dense": SwiGLUSpec(hidden=HIDDEN),
    "moe": MoESpec(n_experts=8, top_k=2, hidden=HIDDEN // 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help='a file or folder of bytes, or "stdlib"; default: built in')
    parser.add_argument("--tokens", type=int, default=400_000, help="per training")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    corpus = load_corpus(args.data)
    recipe = Recipe(args.tokens, seq_len=128, batch_size=8, lr=args.lr)
    rows: list[dict[str, Any]] = []
    with tqdm(total=2 * args.seeds * args.tokens, unit="tok", unit_scale=True) as bar:
        for name, channel in CHANNELS.items():
            block = BlockSpec(AttentionSpec(n_heads=6), channel)
            spec = ModelSpec(D_MODEL, (block,) * LAYERS, Tokens(256), tie_head=True)
            scores = []
            for seed in range(args.seeds):
                model = build_model(spec, seed=seed, device=args.device)
                training = Training(model, corpus, recipe, data_seed=seed)
                failure = training.run(args.tokens, bar.update)
                assert failure is None, failure
                scores.append(training.score())
            cost = spec.cost(128)
            sizes = {"params": cost.params, "active_params": cost.active_params}
            rows.append({"model": name, **sizes, "bits_per_byte": scores})
    if args.json:
        print(json.dumps(rows))
        return
    for row in rows:
        scores = row["bits_per_byte"]
        each = ", ".join(f"{score:.4f}" for score in scores)
        print(
            f"{row['model']:6} {row['params']:>8} parameters, {row['active_params']:>7} active: "
            f"{statistics.mean(scores):.4f} bits/byte ({each})"
        )


if __name__ == "__main__":
    main()
