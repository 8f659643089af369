"""Random pipelines sit the exam of a whole model; faults are printed with their moves.

python scripts/check_pipelines.py --n 200
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

from kizzasi.models import ModelSpec, Tokens, presets
from kizzasi.nas import Xorshift64
from kizzasi.nas.pipelines import PipelineSpace, Variant, to_pipeline
from kizzasi.nas.pipelines.space.tree import nodes
from kizzasi.strict import Registered
from kizzasi.testing import check_model


def tiny_seeds() -> tuple[ModelSpec, ...]:
    stem = Tokens(23)
    seeds = [presets.at_size(f, 20_000, vocab_size=23) for f in ("transformer", "mamba", "rwkv")]
    return tuple(s.replace(stem=stem, blocks=s.blocks[:2]) for s in seeds)


def drawn(space: PipelineSpace, rng: Xorshift64, most: int) -> Variant:
    """A seed after up to `most` moves."""
    variant = Variant(rng.choice(space.seeds))
    for _ in range(rng.choice(range(1, most + 1))):
        variant = space.moved(variant, rng)
    return variant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--moves", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    space = PipelineSpace(tiny_seeds(), max_layers=6, max_width=64)
    rng, start, faults = Xorshift64(args.seed), time.perf_counter(), 0
    kinds: Counter[str] = Counter()
    for i in range(args.n):
        variant = drawn(space, rng, args.moves)
        kinds.update({part.kind for _, part in nodes(variant.spec) if isinstance(part, Registered)})
        try:
            assert to_pipeline(variant.spec).spec == variant.spec, "prints as another model"
            check_model(variant.spec)
        except Exception as error:  # whatever it is, it is a finding
            faults += 1
            text = " ".join(str(error).split())
            print(f"{i}: {variant.name}: {type(error).__name__}: {text:.300}")
            print("   ", " ".join(variant.moves))
            print("   ", variant.spec.canonical_json())
    seconds = time.perf_counter() - start
    print(f"{args.n} pipelines, {faults} with a fault, {seconds:.0f} s")
    print(", ".join(f"{kind} {n}" for kind, n in kinds.most_common()))


if __name__ == "__main__":
    main()
