"""What zero-cost proxies are worth: how they rank small models beside short trainings of them.

Draws models inside a parameter band, trains each on bytes, and compares every proxy's order with
the order of the held-out scores: Spearman, Kendall tau-b and top-k recall with 95 % intervals, and
whether the proxy beats the parameter count. "analytic" is the searchers' score of the genes.

example:
  python scripts/bench_proxies.py --candidates 20 --tokens 32768 --params 60000 --seed 0
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from typing import Any

from tqdm import tqdm

from kizzasi.errors import SpecError
from kizzasi.models import ModelSpec, build_model
from kizzasi.nas import Job, MicroTrain, Xorshift64, proxy_agreement
from kizzasi.nas.evaluators.zero_cost import PROXIES, Batch
from kizzasi.nas.results.rank_agreement import Region
from kizzasi.nas.spaces.ready_made import SMALL_SPACE
from kizzasi.train import Recipe, load_corpus
from kizzasi.train.bytes import batches
from kizzasi.train.seeds import derive_seed

VOCAB, BAND = 256, 0.2
SEQ_LEN, BATCH_SIZE = 128, 4
MAX_DRAWS = 20_000
PROXY_ROWS, PROXY_LENGTH = 8, 64  # of the batch that proxies look at


def draw(n: int, n_params: int, seed: int) -> list[tuple[str, ModelSpec, float]]:
    """Distinct models of the small space, width 32 added, inside the band.

    Returns name, spec and analytic score of each.
    """
    rng = Xorshift64(derive_seed(seed, "candidates"))
    space = dataclasses.replace(SMALL_SPACE, d_model_options=(32, *SMALL_SPACE.d_model_options))
    found: dict[str, tuple[str, ModelSpec, float]] = {}
    for _ in range(MAX_DRAWS):
        candidate = space.sample(rng)
        try:
            spec = candidate.to_spec(vocab_size=VOCAB)
        except SpecError:
            continue  # genes that do not fit each other
        if abs(spec.cost(1).params - n_params) <= BAND * n_params:
            found.setdefault(spec.digest, (candidate.name, spec, candidate.proxy_score()))
        if len(found) == n:
            return list(found.values())
    sys.exit(f"--params {n_params}: {len(found)} candidates found, {n} wanted; change either")


def measure(
    evaluator: MicroTrain, spec: ModelSpec, batch: Batch, tokens: int, seed: int, device: str
) -> tuple[dict[str, float], dict[str, float], float]:
    """Proxy scores, their seconds, and minus the held-out bits per byte (nan: training failed)."""
    model = build_model(spec, seed=seed, device=device)
    scores, seconds = {}, {}
    for name, proxy in PROXIES.items():
        start = time.perf_counter()
        scores[name] = proxy(model, batch)
        seconds[name] = time.perf_counter() - start
    bits = evaluator(Job(spec, tokens, seed, device=device), lambda _: None).score
    return scores, seconds, float("nan") if bits is None else -bits


def compare(rows: list[dict[str, Any]], seed: int, k: int) -> dict[str, Region]:
    """Every proxy beside parameters and chance, over all candidates."""
    trained, params = ([row[key] for row in rows] for key in ("trained", "params"))
    return {
        name: proxy_agreement(
            [row[name] for row in rows], trained, params, [True] * len(rows), seed=seed, k=k
        ).in_band
        for name in (*PROXIES, "analytic")
    }


def show(regions: dict[str, Region], seconds: dict[str, float], k: int) -> None:
    title = ("proxy", "Spearman", "Kendall tau-b", f"top-{k} recall", "tau lead over params", "s")
    widths = (10, 20, 20, 20, 21, 7)
    line = "  ".join(f"{{:<{w}}}" for w in widths)
    print(line.format(*title))
    for name, region in regions.items():
        own = region.proxy
        values = (own.spearman, own.kendall_tau_b, own.top_k_recall, region.lead)
        print(line.format(name, *map(str, values), f"{seconds.get(name, 0.0):.3f}"))
    chance = next(iter(regions.values())).random
    values = (chance.spearman, chance.kendall_tau_b, chance.top_k_recall)
    print(line.format("random", *map(str, values), "", ""))


def _json(value: Any) -> Any:
    """JSON has no infinity and no nan; they become text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument(
        "--params",
        type=int,
        default=60_000,
        help="budget; a fifth more or less is allowed",
    )
    parser.add_argument("--tokens", type=int, default=32_768, help="trained on by each candidate")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate, one for all")
    parser.add_argument("--data", help="file or folder of bytes; default: Python's documentation")
    parser.add_argument("--top", type=int, default=5, help="k of the top-k recall")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead")
    args = parser.parse_args()

    corpus = load_corpus(args.data)
    recipe = Recipe(args.tokens, SEQ_LEN, BATCH_SIZE, args.lr, score_windows=64)
    evaluator = MicroTrain(corpus, recipe)
    stream = batches(corpus.train, PROXY_LENGTH, PROXY_ROWS, derive_seed(args.seed, "proxies"))
    inputs, targets = (x.to(args.device) for x in next(stream))
    rows: list[dict[str, Any]] = []
    seconds = dict.fromkeys(PROXIES, 0.0)
    drawn = draw(args.candidates, args.params, args.seed)
    for name, spec, analytic in tqdm(drawn, desc="candidates"):
        scores, spent, trained = measure(
            evaluator, spec, (inputs, targets), args.tokens, args.seed, args.device
        )
        rows.append({"name": name, **scores, "analytic": analytic, "trained": trained})
        seconds = {key: seconds[key] + spent[key] / args.candidates for key in seconds}
    regions = compare(rows, args.seed, args.top)
    if args.json:
        worth = {name: dataclasses.asdict(region) for name, region in regions.items()}
        finite = [{k: _json(v) for k, v in row.items()} for row in rows]
        print(json.dumps({"candidates": finite, "worth": worth, "seconds": seconds}))
        return
    print(f"{regions['params'].n} of {len(rows)} candidates trained; means of seconds per proxy")
    show(regions, seconds, args.top)


if __name__ == "__main__":
    main()
