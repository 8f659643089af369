"""A language model on bytes with one layer of EML attention, beside its affine twin.

Two layers: softmax attention with rotations, which tells positions apart, then `eml_attention` with
chains of EML operators, or with none (the twin); a SwiGLU after each. Both are trained with
gradients on the same bytes. Scores are bits/byte on held-out text; the aim is a ratio below 1.05.

example:
  python scripts/bench_eml_lm.py --tokens 200000 --seeds 3
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
from tqdm import tqdm

from kizzasi.eml import EmlAttentionSpec
from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.channels import SwiGLUSpec
from kizzasi.models.mixers import AttentionSpec
from kizzasi.train import Recipe, Training, load_corpus

D_MODEL, N_HEADS, HIDDEN, EML_DEPTH = 64, 4, 160, 3
WANTED = 1.05


def language_model(depth: int) -> ModelSpec:
    """The model whose second layer has `depth` EML operators per channel; 0 is affine."""
    channel = SwiGLUSpec(hidden=HIDDEN)
    blocks = (
        BlockSpec(AttentionSpec(n_heads=N_HEADS), channel),
        BlockSpec(EmlAttentionSpec(n_heads=N_HEADS, depth=depth), channel),
    )
    return ModelSpec(D_MODEL, blocks, Tokens(256), tie_head=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help='a file or folder of bytes, or "stdlib"; default: built in')
    parser.add_argument("--tokens", type=int, default=200_000, help="per training (200000)")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0, help="the first one (0)")
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
        for name, depth in {"affine": 0, "eml": EML_DEPTH}.items():
            spec = language_model(depth)
            scores = []
            for seed in range(args.seed, args.seed + args.seeds):
                model = build_model(spec, seed=seed, device=args.device)
                training = Training(model, corpus, recipe, data_seed=seed)
                failure = training.run(args.tokens, bar.update)
                assert failure is None, failure
                scores.append(training.score())
            rows.append({"model": name, "params": spec.cost(128).params, "bits_per_byte": scores})
    affine, eml = (statistics.mean(row["bits_per_byte"]) for row in rows)
    if args.json:
        print(json.dumps({"rows": rows, "ratio": eml / affine}))
        return
    for row in rows:
        scores = row["bits_per_byte"]
        each = ", ".join(f"{score:.4f}" for score in scores)
        mean = statistics.mean(scores)
        print(f"{row['model']:6} {row['params']:>7} parameters: {mean:.4f} bits/byte ({each})")
    verdict = "ok" if eml <= WANTED * affine else "MISSED"
    print(f"ratio {eml / affine:.4f}, wanted at most {WANTED}: {verdict}")


if __name__ == "__main__":
    main()
