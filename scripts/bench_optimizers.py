"""What the optimizer of short trainings decides: how low families get, and how candidates rank.

families   every family at about 200,000 parameters, under AdamW and Muon, at 1, 3 and 10 times the
           first rung of the default search. Each budget is a training of its own, down its whole
           schedule. Seed 0 chooses the rate: all rates at 1x, then the best one and the next lower
           one at each longer budget. The figures are of further seeds, on valid; a figure with a
           star is that of seed 0.
hybrids    random members of the default space, each trained once under each optimizer down the
           schedule of 10x and scored at 1x, 3x and 10x on the way, as a search does; the rate is
           the best one at 1x. Kendall's tau-b between the rankings, with a bootstrap interval.

What is done is in a journal; the next call goes on from there.

examples:
  python scripts/bench_optimizers.py families --journal families.jsonl --minutes 9
  python scripts/bench_optimizers.py hybrids --journal hybrids.jsonl --n 24 --json
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kizzasi.models import BlockSpec, LayerSpec, ModelSpec, Tokens, build_model, presets
from kizzasi.models.channels import SwiGLUSpec
from kizzasi.models.mixers import AttentionSpec, GLASpec, Mamba2Spec, MambaSpec
from kizzasi.nas import Constraints, Feasible, SearchConfig, Xorshift64, kendall_tau_b
from kizzasi.nas.spaces.ready_made import hybrid
from kizzasi.nas.spaces.resize import at_width
from kizzasi.nas.study.journal import Journal
from kizzasi.train import Recipe, Task, Training, derive_seed
from kizzasi.train.open import open_task

CONFIG = SearchConfig()
RATES = {"adamw": (2e-3, 4e-3, 8e-3, 1.6e-2), "muon": (4e-3, 8e-3, 1.6e-2, 3.2e-2)}
FIRST = CONFIG.rungs[0]
TIMES = (1, 3, 10)
N_BOOT = 2000


def sized(d_model: int, *blocks: LayerSpec) -> ModelSpec:
    """These layers at the width that comes nearest to the usual number of parameters."""
    spec = ModelSpec(d_model, blocks, Tokens(256), tie_head=True)
    widths = [at_width(spec, d) for d in range(d_model // 2, d_model + 1, 8)]
    return min(widths, key=lambda one: abs(one.cost(1).params - CONFIG.n_params))


@functools.cache
def families() -> dict[str, ModelSpec]:
    """The usual proportions of each family, and a hybrid."""
    mamba = BlockSpec(MambaSpec())
    mamba2 = BlockSpec(Mamba2Spec(d_state=32, head_dim=16))
    gla = BlockSpec(GLASpec(n_heads=8), SwiGLUSpec())
    attention = BlockSpec(AttentionSpec(n_heads=8), SwiGLUSpec())
    usual = {name: presets.at_size(name, CONFIG.n_params, vocab_size=256) for name in presets.SMALL}
    return {
        **usual,
        "mamba2": sized(128, *[mamba2] * 4),
        "gla": sized(128, *[gla] * 4),
        "3 mamba, attention": sized(128, mamba, mamba, mamba, attention),
    }


def trained(
    task: Task, spec: ModelSpec, optimizer: Any, rate: float, seed: int, n: int
) -> Training:
    """A training that ends with n tokens, not begun."""
    recipe = Recipe(n, CONFIG.seq_len, CONFIG.batch_size, rate, optimizer=optimizer)
    return Training(build_model(spec, seed=seed), task, recipe, derive_seed(seed, "data"))


class Work:
    """Pieces of work, each done once.

    Args:
        journal: what is done.
        task: what is learned.
        until: no piece begins after this time.
    """

    def __init__(self, journal: Journal, task: Task, until: float) -> None:
        self.journal, self.task, self.until = journal, task, until
        self.done = {event["key"]: event for event in journal.events}

    def once(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was found under this key. Raises TimeoutError if time is over before it begins."""
        if key not in self.done:
            if time.monotonic() > self.until:
                raise TimeoutError
            self.done[key] = self.journal.append({"event": "found", "key": key, **make()})
        return self.done[key]

    def score(
        self, name: str, spec: ModelSpec, cell: tuple[str, int], rate: float, seed: int
    ) -> float:
        """Of one training down its whole schedule; infinity if it failed."""
        optimizer, times = cell

        def make() -> dict[str, Any]:
            training = trained(self.task, spec, optimizer, rate, seed, times * FIRST)
            failure = training.run(times * FIRST)
            return {"score": None if failure else training.score()}

        key = f"{name} {spec.digest[:8]} {optimizer} {rate:g} {times}x {seed}"
        found = self.once(key, make)["score"]
        return float("inf") if found is None else found


def family_rows(work: Work, n_seeds: int, bar: Callable[[], object]) -> list[dict[str, Any]]:
    """Every family, optimizer and budget: the rate, and a score for each seed that there was time
    for."""
    rows = [
        {"name": name, "params": spec.cost(1).params, "optimizer": o, "times": t, "scores": []}
        for name, spec in families().items()
        for o in RATES
        for t in TIMES
    ]
    for times in TIMES:  # short budgets first: what there is time for is whole
        here = [row for row in rows if row["times"] == times]
        for row in here:
            with suppress(TimeoutError):
                _choose_rate(work, row, rows)
            bar()
        for seed, row in ((s, r) for s in range(1, n_seeds + 1) for r in here if "rate" in r):
            spec, cell = families()[row["name"]], (row["optimizer"], times)
            with suppress(TimeoutError):
                row["scores"].append(work.score(row["name"], spec, cell, row["rate"], seed))
            bar()
    return rows


def _choose_rate(work: Work, row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """By seed 0: of all rates at the shortest budget, of the last best and the next lower one at
    the others."""
    rates, shorter = RATES[row["optimizer"]], rows[rows.index(row) - 1]
    if row["times"] > TIMES[0]:
        if "rate" not in shorter:
            return
        best = rates.index(shorter["rate"])
        rates = rates[max(0, best - 1) : best + 1]
    spec, cell = families()[row["name"]], (row["optimizer"], row["times"])
    found = {rate: work.score(row["name"], spec, cell, rate, 0) for rate in rates}
    row["rate"], row["sweep"] = min(found, key=found.__getitem__), found


def random_hybrids(n: int) -> Iterator[ModelSpec]:
    """Distinct members of the default space within the band."""
    low, high = (CONFIG.n_params * (1 + sign * CONFIG.band) for sign in (-1, 1))
    space, rng = (
        Feasible(hybrid(), Constraints(params=(low, high)), stem=Tokens(256)),
        Xorshift64(1),
    )
    found: dict[str, ModelSpec] = {}
    while len(found) < n:
        spec = space.sample(rng).spec
        found.setdefault(spec.digest, spec)
    yield from found.values()


def hybrid_rows(work: Work, n: int, bar: Callable[[], object]) -> list[dict[str, Any]]:
    """Every hybrid and optimizer: the rate, and the scores at each budget."""
    rows: list[dict[str, Any]] = []

    def make(spec: ModelSpec, optimizer: str) -> dict[str, Any]:
        horizon, sweep = TIMES[-1] * FIRST, dict[float, float]()
        best: Training | None = None
        for rate in RATES[optimizer]:
            training = trained(work.task, spec, optimizer, rate, 0, horizon)
            if training.run(FIRST) is not None:
                continue
            sweep[rate] = training.score()
            if sweep[rate] == min(sweep.values()):
                best = training
        assert best is not None, "every rate diverged"
        scores: list[float | None] = [min(sweep.values())]
        for times in TIMES[1:]:
            scores.append(best.score() if best.run(times * FIRST) is None else None)
        return {
            "rate": best.recipe.lr,
            "sweep": {f"{k:g}": v for k, v in sweep.items()},
            "scores": scores,
            "curve": best.curve,
        }

    try:
        for spec in random_hybrids(n):
            for optimizer in RATES:
                key = f"{spec.digest[:12]} {optimizer}"
                found = work.once(key, lambda s=spec, o=optimizer: make(s, o))
                rows.append({"id": spec.digest[:12], "optimizer": optimizer, **found})
                bar()
    except TimeoutError:
        pass
    return rows


def agreement(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Kendall's tau-b of rankings at 1x and at 10x, over the hybrids that have all scores."""
    table: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        table.setdefault(row["id"], {})[row["optimizer"]] = row["scores"]
    whole = [own for own in table.values() if set(own) == set(RATES)]
    whole = [own for own in whole if all(None not in scores for scores in own.values())]
    if len(whole) < 3:
        return []
    columns = {
        f"{o} {t}x": [own[o][i] for own in whole] for o in RATES for i, t in enumerate(TIMES)
    }
    last = f"{TIMES[-1]}x"
    columns[f"the better of both {last}"] = [min(own[o][-1] for o in RATES) for own in whole]
    pairs = [
        *((f"{o} {t}x", f"{o} {last}") for o in RATES for t in TIMES[:-1]),
        *((f"{o} {t}x", f"the better of both {last}") for o in RATES for t in TIMES[:-1]),
        (f"adamw {last}", f"muon {last}"),
    ]
    draws = np.random.default_rng(0).integers(len(whole), size=(N_BOOT, len(whole)))
    found, taus = [], {}
    for short, long in pairs:
        x, y = np.array(columns[short]), np.array(columns[long])
        taus[short, long] = np.array([kendall_tau_b(x[d], y[d]) for d in draws], dtype=float)
        found.append(_interval(short, long, kendall_tau_b(x, y), taus[short, long], len(whole)))
    gain = [(f"{o} {TIMES[0]}x", f"the better of both {last}") for o in ("muon", "adamw")]
    tau = {pair: next(f["tau"] for f in found if (f["short"], f["long"]) == pair) for pair in gain}
    lead = taus[gain[0]] - taus[gain[1]]
    found.append(
        _interval(
            "muon 1x less adamw 1x", gain[0][1], tau[gain[0]] - tau[gain[1]], lead, len(whole)
        )
    )
    return found


def _interval(short: str, long: str, tau: Any, resampled: np.ndarray, n: int) -> dict[str, Any]:
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    return {
        "short": short,
        "long": long,
        "tau": tau,
        "low": float(low),
        "high": float(high),
        "n": n,
    }


def printed(rows: list[dict[str, Any]]) -> str:
    """The rows of families as a Markdown table."""
    names = list(dict.fromkeys((row["name"], row["params"]) for row in rows))
    columns = [(o, t) for o in RATES for t in TIMES]
    lines = [
        "| family | parameters | " + " | ".join(f"{o} {t}x" for o, t in columns) + " |",
        "| --- | ---: |" + " ---: |" * len(columns),
    ]
    for name, params in names:
        cells = []
        for column in columns:
            row = next(
                r for r in rows if (r["name"], r["optimizer"], r["times"]) == (name, *column)
            )
            scores = row["scores"]
            if not scores:
                best = min(row.get("sweep", {}).values(), default=None)
                cells.append("-" if best is None else f"{best:.3f}* at {row['rate']:g}")
                continue
            spread = f" ({min(scores):.3f} to {max(scores):.3f})" if len(scores) > 1 else ""
            cells.append(f"{statistics.fmean(scores):.3f}{spread} at {row['rate']:g}")
        lines.append(f"| {name} | {params:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def printed_agreement(found: list[dict[str, Any]]) -> str:
    """Rank agreement as a Markdown table."""
    lines = ["| ranking | beside | Kendall tau-b | hybrids |", "| --- | --- | ---: | ---: |"]
    for row in found:
        interval = f"{row['tau']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        lines.append(f"| {row['short']} | {row['long']} | {interval} | {row['n']} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("families", "hybrids"))
    parser.add_argument("--journal", type=Path, help="where results go (default: PART.jsonl)")
    parser.add_argument("--data", help="as of `kizzasi search`")
    parser.add_argument("--seeds", type=int, default=3, help="of families, beside seed 0 (3)")
    parser.add_argument("--n", type=int, default=24, help="hybrids (24)")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin nothing after these")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    path = args.journal or Path(f"{args.part}.jsonl")
    task = open_task(args.data, test_fraction=CONFIG.test_fraction)
    cells = len(families()) * len(RATES) * len(TIMES) * (1 + args.seeds)
    total = cells if args.part == "families" else args.n * len(RATES)
    with Journal(path) as journal, tqdm(total=total, desc=args.part, disable=None) as bar:
        work = Work(journal, task, time.monotonic() + 60 * args.minutes)
        if args.part == "families":
            rows = family_rows(work, args.seeds, bar.update)
            text = printed(rows)
            found: Any = rows
        else:
            rows = hybrid_rows(work, args.n, bar.update)
            taus = agreement(rows)
            text = printed_agreement(taus)
            found = {"hybrids": rows, "agreement": taus}
    print(json.dumps(found) if args.json else text)


if __name__ == "__main__":
    main()
