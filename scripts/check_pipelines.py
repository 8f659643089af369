"""Random pipelines sit the exam of a whole model; faults are printed with their moves.

No leak, any split (three at random), steps and packed documents, each in float64. Then those with a
window are given EvoForge's mask, the larger of the causal one and a window on both sides, and every
one that it reaches has to be caught.

python scripts/check_pipelines.py --n 200
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from kizzasi.models import ModelSpec, Tokens, presets
from kizzasi.models.attention.cache import layout
from kizzasi.models.call import Call
from kizzasi.models.mixers import attention
from kizzasi.models.ops.stencil import Stencil
from kizzasi.nas import Xorshift64
from kizzasi.nas.pipelines import PipelineSpace, Variant, to_pipeline
from kizzasi.nas.pipelines.space.tree import nodes, of_kind
from kizzasi.strict import Registered
from kizzasi.testing import check_model
from kizzasi.testing.mixer import Exam
from kizzasi.testing.model import LENGTH, first_leak


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


def pieces(rng: Xorshift64, length: int = LENGTH + 1) -> tuple[int, ...]:
    """Lengths that sum to the length."""
    cuts = sorted({rng.choice(range(1, length)) for _ in range(rng.choice(range(1, 8)))})
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True))


def evoforges(call: Call, state: Any, stencil: Stencil) -> Tensor:
    """(b, 1, t, s) whom a query sees by EvoForge's rule."""
    sight = layout(call, state, stencil)
    age = sight.query.position[:, :, None] - sight.key.position[:, None]
    seen = (age >= 0) | (age.abs() <= (stencil.window or 0))
    alike = sight.query.document[:, :, None] == sight.key.document[:, None]
    return (seen & alike)[:, None]


def caught(spec: ModelSpec) -> bool | None:
    """Whether that rule is found in a model; None if there is no window in its place, or it shows
    no query a later key (of a stack at a lower rate there may be one token)."""
    found = [part for _, part in of_kind(spec.blocks, "attention")]
    if not any(part.window and part.causal for part in found):
        return None
    whole = patch.object(
        Stencil, "plan", lambda *_, **__: None
    )  # the rule alone says who sees whom
    exam = Exam(spec, spec, training=False)
    model, tokens = exam.make(), exam.tokens(1, LENGTH)
    with torch.no_grad():
        before = model(tokens).logits
        with whole, patch.object(attention, "visible", evoforges):
            if torch.allclose(model(tokens).logits, before):
                return None
            return first_leak(spec) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--moves", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    space = PipelineSpace(tiny_seeds(), max_layers=6, max_width=64)
    rng, start, faults = Xorshift64(args.seed), time.perf_counter(), 0
    kinds: Counter[str] = Counter()
    planted: Counter[bool] = Counter()
    for i in range(args.n):
        variant = drawn(space, rng, args.moves)
        kinds.update({part.kind for _, part in nodes(variant.spec) if isinstance(part, Registered)})
        try:
            assert to_pipeline(variant.spec).spec == variant.spec, "prints as another model"
            splits = [pieces(rng) for _ in range(3)]
            check_model(variant.spec, splits=splits)
            seen = caught(variant.spec)
            planted.update([] if seen is None else [seen])
            assert seen is not False, "EvoForge's mask is not caught"
        except Exception as error:  # whatever it is, it is a finding
            faults += 1
            text = " ".join(str(error).split())
            print(f"{i}: {variant.name}: {type(error).__name__}: {text:.300}")
            print("   ", " ".join(variant.moves))
            print("   ", variant.spec.canonical_json())
    seconds = time.perf_counter() - start
    print(f"{args.n} pipelines, {faults} with a fault, {seconds:.0f} s")
    print(f"EvoForge's mask caught in {planted[True]} of {planted.total()} with a window")
    print(", ".join(f"{kind} {n}" for kind, n in kinds.most_common()))


if __name__ == "__main__":
    main()
