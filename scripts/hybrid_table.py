"""The table of trained hybrids: a space of 216 models, all of them trained, to judge searches by.

train    each of six mixers in each of three layers, two seeds, on the standard library's source:
         bits a byte on valid data at every rung, and on test data at the end
facts    what is known without that training: parameters, flops, state bytes, time of a decoded
         token, zero-cost proxies, recall of key-value pairs after a training of its own
tune     of some models, each with a rate of its own: the best of four on valid data after a
         training with seed 0, then test data after trainings with further seeds
write    the table of these journals, as `kizzasi.nas.tables.hybrid216` reads it

What is done is in a journal; the next call goes on from there. Several processes, one journal each,
share the work: each reads the others' (--beside) before it begins a piece.

examples:
  python scripts/hybrid_table.py train --journal a.jsonl
  python scripts/hybrid_table.py train --journal b.jsonl --beside a.jsonl --from-the-end
  python scripts/hybrid_table.py train --journal more.jsonl --models 43 86 --seeds 2 3 4 5 6
  python scripts/hybrid_table.py facts --journal f.jsonl
  python scripts/hybrid_table.py tune --journal t.jsonl --models 53 81 0 43 86 129 172 215
  python scripts/hybrid_table.py write --journal a.jsonl --beside b.jsonl f.jsonl --out table.json
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import kizzasi
from kizzasi.files import write_text
from kizzasi.models import Decoder, ModelSpec, build_model
from kizzasi.nas.evaluators.probes import PROBES
from kizzasi.nas.evaluators.zero_cost import PROXIES
from kizzasi.nas.results.noise import t_quantile
from kizzasi.nas.spaces.model_space import ModelSpace, name_of
from kizzasi.nas.study.journal import Journal, read_events
from kizzasi.nas.tables.table import to_json
from kizzasi.train import Recipe, Task, Training, derive_seed
from kizzasi.train.open import open_task
from kizzasi.train.task import Shape

RUNGS = (16_384, 49_152, 147_456)
SEEDS = (0, 1)
RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)  # of tune
FRESH = (2, 3, 4, 5, 6)  # seeds of tune
LATENCY_LEN = 4096
OWN = ("state_bytes", "ms", "recall")  # facts beside the proxies
Todo = dict[str, Callable[[], dict[str, Any]]]
RATE = 1.6e-2
RECIPE = Recipe(RUNGS[-1], 256, 4, RATE, optimizer="muon", score_windows=128)
SLOT = (  # about 32,700 parameters each
    {"mixer": {"kind": "attention", "n_heads": 4}, "channel": {"kind": "swiglu", "hidden": 84}},
    {"mixer": {"kind": "mamba"}, "channel": None},
    {"mixer": {"kind": "mamba2", "d_state": 48, "head_dim": 16}, "channel": None},
    {"mixer": {"kind": "gated_delta", "n_heads": 4}, "channel": {"kind": "swiglu", "hidden": 56}},
    {"mixer": {"kind": "rwkv7", "head_dim": 16}, "channel": None},
    {"mixer": {"kind": "short_conv"}, "channel": {"kind": "swiglu", "hidden": 83}},
)
TEMPLATE = {
    "d_model": 64,
    "blocks": [{"choice": list(SLOT)}] * 3,
    "stem": {"kind": "tokens", "vocab_size": 256},
    "tie_head": True,
}


def models() -> list[ModelSpec]:
    """All of them, in the order of the space."""
    return [candidate.spec for candidate in ModelSpace(TEMPLATE).iterate()]


class Pieces:
    """Work that is done once, by whoever comes first.

    Args:
        journal: of this process.
        beside: journals of others.
    """

    def __init__(self, journal: Path, beside: Iterable[Path]) -> None:
        self.journal, self.beside = Journal(journal), tuple(beside)
        self.own = {event["key"] for event in self.journal.events}

    def run(self, pieces: Mapping[str, Callable[[], dict[str, Any]]]) -> None:
        """Do what nobody has done, in this order."""
        for key in tqdm(pieces, disable=None):
            if key not in self.own and key not in self._others():
                self.journal.append({"event": "found", "key": key, **pieces[key]()})
                self.own.add(key)

    def _others(self) -> set[str]:
        return {
            event["key"] for path in self.beside if path.exists() for event in read_events(path)
        }


def trained(task: Task, spec: ModelSpec, seed: int, rate: float = RATE) -> dict[str, Any]:
    """Scores of one training: on valid data at every rung, and on test data at the end."""
    recipe = replace(RECIPE, lr=rate)
    training = Training(build_model(spec, seed=seed), task, recipe, derive_seed(seed, "data"))
    valid: list[float] = []
    for rung in RUNGS:
        failure = training.run(rung)
        if failure is not None:
            return {"valid": valid, "test": None, "failure": failure}
        valid.append(round(training.score(), 5))
    return {"valid": valid, "test": round(training.score("test"), 5)}


def tuned(task: Task, spec: ModelSpec) -> dict[str, Any]:
    """Valid score by rate, the best one, and with that the test score by seed."""
    valid = {rate: trained(task, spec, 0, rate)["valid"] for rate in RATES}
    swept = {rate: scores[-1] for rate, scores in valid.items() if len(scores) == len(RUNGS)}
    best = min(swept, key=swept.__getitem__)
    test = {seed: trained(task, spec, seed, best)["test"] for seed in FRESH}
    return {"swept": swept, "rate": best, "test": test}


def tuned_rows(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line of Markdown for each tuned model, the best one first. Differences are paired over
    seeds, with their 95 % interval."""
    specs = models()
    rows = {int(key.split()[1]): one for key, one in found.items() if key.startswith("tune ")}
    tests = {i: [row["test"][str(seed)] for seed in FRESH] for i, row in rows.items()}
    single = [i for i in rows if len(set(specs[i].blocks)) == 1]
    names = " | ".join(f"less {name_of(specs[i])}" for i in single)
    lines = [
        f"| model | parameters | rate | test | {names} |",
        "|---|" + "---:|" * (3 + len(single)),
    ]
    for i in sorted(rows, key=lambda i: statistics.fmean(tests[i])):
        told = [name_of(specs[i]), f"{specs[i].cost(1).params:,}", f"{rows[i]['rate']:g}"]
        told.append(f"{statistics.fmean(tests[i]):.4f}")
        for other in single:
            gaps = [a - b for a, b in zip(tests[i], tests[other], strict=True)]
            half = t_quantile(0.975, len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps))
            told.append("" if i == other else f"{statistics.fmean(gaps):+.3f} ± {half:.3f}")
        lines.append(f"| {' | '.join(told)} |")
    return lines


def proxies(task: Task, spec: ModelSpec) -> dict[str, Any]:
    """Every zero-cost proxy, on one batch of the training data."""
    shape = Shape(RECIPE.seq_len, RECIPE.batch_size)
    batch = next(task.batches("train", 0, 0, shape))
    model = build_model(spec, seed=0)
    return {name: proxy(model, (batch.inputs, batch.targets)) for name, proxy in PROXIES.items()}


def latency(spec: ModelSpec, n_tokens: int = 64) -> dict[str, Any]:
    """Milliseconds of processor time that a token takes after LATENCY_LEN others."""
    model = build_model(spec, seed=0).eval()
    with torch.no_grad():
        decoder = Decoder(model, model(torch.zeros(1, LATENCY_LEN, dtype=torch.long)).state)
    token = torch.zeros(1, dtype=torch.long)

    def seconds() -> float:
        start = time.process_time()
        for _ in range(n_tokens):
            decoder.step(token)
        return time.process_time() - start

    seconds()  # programs are written
    return {"ms": 1e3 * statistics.median(seconds() for _ in range(5)) / n_tokens}


def recall(spec: ModelSpec) -> dict[str, Any]:
    """Right answers to key-value pairs after a training on such alone; see `PROBES`."""
    return {"recall": PROBES["recall"](spec).accuracy}


def pieces(
    part: str, data: str, only: Iterable[int], seeds: Iterable[int]
) -> dict[str, Callable[[], dict[str, Any]]]:
    """What there is to do, by the names under which it is journalled."""
    every = models()
    specs = {i: every[i] for i in only or range(len(every))}
    task = open_task(data)
    if part == "tune":
        return {f"tune {i}": partial(tuned, task, spec) for i, spec in specs.items()}
    if part == "train":
        return {
            _key(i, seed): partial(trained, task, spec, seed)
            for seed in seeds
            for i, spec in specs.items()
        }
    return {
        **{f"proxies {i}": partial(proxies, task, spec) for i, spec in specs.items()},
        **{f"latency {i}": partial(latency, spec) for i, spec in specs.items()},
        **{f"recall {i}": partial(recall, spec) for i, spec in specs.items()},
    }


def table(data: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """As `hybrid216` reads it, with the seeds that all models were trained on. Raises SystemExit if
    there is none."""
    specs, task = models(), open_task(data)
    missing = [[i for i in range(len(specs)) if _key(i, seed) not in found] for seed in SEEDS]
    seeds = [seed for seed, own in zip(SEEDS, missing, strict=True) if not own]
    if not seeds:
        raise SystemExit(f"model {missing[0][0]} is not trained; run `train` first")
    about = {
        "template": TEMPLATE,
        "rungs": RUNGS,
        "seeds": seeds,
        "recipe": asdict(RECIPE),
        "data": data,
        "digest": task.digest,
        "metric": task.metric.name,
        "command": "python scripts/hybrid_table.py train; facts; write",
        "versions": {"kizzasi": kizzasi.__version__, "torch": torch.__version__},
        "facts at": LATENCY_LEN,
    }
    rows, names = [], list(dict.fromkeys(("params", "flops", *OWN, *PROXIES)))
    for i, spec in enumerate(specs):
        trainings = [found[_key(i, seed)] for seed in seeds]
        cost = spec.cost(LATENCY_LEN)
        known: dict[str, Any] = {}
        for part in ("latency", "recall", "proxies"):
            known |= found.get(f"{part} {i}", {})
        known |= {n: getattr(cost, n) for n in ("params", "flops", "state_bytes")}
        facts = [_rounded(known.get(name)) for name in names]
        rows.append(([t["valid"] for t in trainings], [t["test"] for t in trainings], facts))
    return to_json(about, names, rows)


def _key(i: int, seed: int) -> str:
    return f"train {i} seed {seed}"


def _rounded(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.5g}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("train", "facts", "tune", "write"))
    parser.add_argument("--journal", type=Path, required=True, help="what this process finds")
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="journals of others")
    parser.add_argument("--data", default="stdlib", help="as of `kizzasi search`")
    parser.add_argument("--models", type=int, nargs="*", default=[], help="some alone, by place")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of train")
    parser.add_argument("--from-the-end", action="store_true", help="begin with the last piece")
    parser.add_argument("--out", type=Path, default=Path("hybrid216.json"), help="of write")
    args = parser.parse_args(arguments)
    if args.part == "write":
        journals = [args.journal, *args.beside]
        found = {event["key"]: event for path in journals for event in read_events(path)}
        write_text(args.out, table(args.data, found))
        return
    todo = pieces(args.part, args.data, args.models, args.seeds)
    if args.from_the_end:
        todo = dict(reversed(todo.items()))
    Pieces(args.journal, args.beside).run(todo)
    if args.part == "tune":
        journals = [args.journal, *(path for path in args.beside if path.exists())]
        found = {event["key"]: event for path in journals for event in read_events(path)}
        print("\n".join(tuned_rows(found)))


if __name__ == "__main__":
    main()
