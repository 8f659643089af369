"""Published results at the size of a laptop: who solves which task, beside what papers report.

Each table trains a few architectures from scratch on fresh examples, for every seed at each of a
few learning rates, keeps the rate with the best median on examples of its own, and prints the
median and range over seeds of the right answers on further ones, at the trained length and at
others. "published" is what the source reports in its own, larger setting: who wins should agree,
the figures need not.

examples:
  python scripts/reproduce.py parity --seeds 3
  python scripts/reproduce.py --list
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from kizzasi.models import BlockSpec, ModelSpec, Tokens, build_model
from kizzasi.models.channels import SwiGLUSpec
from kizzasi.models.mixer import MixerSpec
from kizzasi.train import Recipe, Training
from kizzasi.train.synthetic import (
    MQAR,
    Examples,
    GroupProducts,
    InductionHeads,
    ModularArithmetic,
    Parity,
    Reverse,
    SelectiveCopying,
    SyntheticTask,
)


@dataclass(frozen=True)
class Row:
    """name: as printed. mixer: as data, or None for `spec`. published: what the source reports."""

    name: str
    mixer: dict[str, Any]
    published: str = "-"


@dataclass(frozen=True)
class Table:
    """What one table trains.

    Args:
        source: paper, and its setting where ours is smaller.
        examples: to train on, and to be tested on first.
        tests: further examples to be tested on, by the column's name.
        rows: the architectures.
        d_model, n_layers: of all rows; no channels, unless `hidden` is their width.
        steps, batch_size, rates: of every training.
    """

    source: str
    examples: Examples
    tests: dict[str, Examples]
    rows: tuple[Row, ...]
    d_model: int = 64
    n_layers: int = 2
    hidden: int | None = None
    steps: int = 2000
    batch_size: int = 32
    rates: tuple[float, ...] = (1e-3, 4e-3)

    def spec(self, row: Row) -> ModelSpec:
        channel = None if self.hidden is None else SwiGLUSpec(hidden=self.hidden)
        block = BlockSpec(MixerSpec.from_dict(row.mixer), channel)
        stem = Tokens(self.examples.vocab_size)
        return ModelSpec(self.d_model, (block,) * self.n_layers, stem)


HEADS = {"n_heads": 4}
NEGATIVE = {"kind": "gated_delta", **HEADS, "negative_eigenvalues": True}
MAMBA2 = {"kind": "mamba2", "d_state": 64, "head_dim": 16}
TABLES = {
    "parity": Table(
        "Mamba-3, arXiv:2603.15569: trained to length 160, tested at 256, 10,000 steps a stage",
        Parity(40),
        {"64": Parity(64, 64), "256": Parity(256, 256)},
        (
            Row("mamba2", MAMBA2, "0.9 % above chance"),
            Row("gated_delta", {"kind": "gated_delta", **HEADS}, "fails (arXiv:2411.12537)"),
            Row("gated_delta, negative", NEGATIVE, "100 %"),
            Row("mamba3", {"kind": "mamba3", "d_state": 64, "head_dim": 16}, "100 %"),
            Row("rwkv7", {"kind": "rwkv7", "head_dim": 16}, "solves (arXiv:2503.14456)"),
            Row("slstm", {"kind": "slstm", **HEADS}, "solves (arXiv:2405.04517)"),
            Row("attention", {"kind": "attention", **HEADS}, "fails (arXiv:2411.12537)"),
        ),
        d_model=32,
        n_layers=1,
        rates=(2e-3, 1e-2),
    ),
    "modular_arithmetic": Table(
        "Mamba-3, arXiv:2603.15569: without brackets, 3 layers, tested at 256",
        ModularArithmetic(41),
        {"81": ModularArithmetic(81)},
        (
            Row("mamba2", MAMBA2, "48 % above chance"),
            Row("gated_delta, negative", NEGATIVE, "99 %"),
            Row("mamba3", {"kind": "mamba3", "d_state": 64, "head_dim": 16}, "99 %"),
            Row("slstm", {"kind": "slstm", **HEADS}, "-"),
        ),
    ),
    "group_products": Table(
        "Merrill et al. 2024, arXiv:2404.08819: A5; DeltaProduct, arXiv:2502.10297: S3 to S5",
        GroupProducts("A4", 12),
        {"24": GroupProducts("A4", 24)},
        (
            Row("mamba", {"kind": "mamba"}, "depth grows with length"),
            Row("attention", {"kind": "attention", **HEADS}, "depth grows with length"),
            Row("gated_delta, negative", NEGATIVE, "-"),
            Row("delta_product, 2", {"kind": "delta_product", **HEADS, "n_updates": 2}, "S3, A4"),
            Row("rwkv7", {"kind": "rwkv7", "head_dim": 16}, "S5 with two layers"),
            Row("slstm", {"kind": "slstm", **HEADS}, "solves"),
        ),
        n_layers=1,
    ),
    "selective_copying": Table(
        "Mamba, arXiv:2312.00752, table 1: length 4096, 400,000 steps",
        SelectiveCopying(16, 64, 8),
        {},
        (
            Row("s4", {"kind": "s4", "d_state": 16}, "18.3 %"),
            Row("s4d", {"kind": "s4d", "d_state": 16}, "-"),
            Row("long_conv", {"kind": "long_conv", "max_len": 64}, "30.1 % (in H3)"),
            Row("mamba", {"kind": "mamba"}, "99.8 %"),
        ),
    ),
    "induction_heads": Table(
        "Mamba, arXiv:2312.00752, table 2: trained at 256, tested up to 2^20",
        InductionHeads(16, 64),
        {str(n): InductionHeads(16, n) for n in (128, 256, 1024)},
        (
            Row("attention, rope", {"kind": "attention", **HEADS}, "fails at 2 to 4 times"),
            Row("retention (xPos)", {"kind": "retention", **HEADS}, "-"),
            Row("mamba", {"kind": "mamba"}, "100 % at every length"),
            Row("gated_delta", {"kind": "gated_delta", **HEADS}, "-"),
        ),
        steps=4000,
    ),
    "mqar": Table(
        "Zoology, arXiv:2312.04927; Mamba-2, arXiv:2405.21060, figure 8: more state recalls more",
        MQAR(64, 64, 8),
        {"16 pairs": MQAR(64, 128, 16)},
        (
            Row("attention", {"kind": "attention", **HEADS}, "solves at every width"),
            Row("rwkv4", {"kind": "rwkv4"}, "needs width"),
            Row("mamba, d_state 4", {"kind": "mamba", "d_state": 4}, "-"),
            Row("mamba, d_state 16", {"kind": "mamba", "d_state": 16}, "below mamba2"),
            Row("mamba2, d_state 16", {**MAMBA2, "d_state": 16}, "below attention"),
            Row("mamba2, d_state 64", MAMBA2, "as attention"),
            Row("gated_delta", {"kind": "gated_delta", **HEADS}, "solves (arXiv:2412.06464)"),
        ),
    ),
    "reverse": Table(
        "RWKV-LM's demonstration: numbers up to 60 digits, 10,000 steps of 256",
        Reverse(12),
        {},
        (
            Row("rwkv7", {"kind": "rwkv7", "head_dim": 16}, "100 %"),
            Row("gated_delta", {"kind": "gated_delta", "n_heads": 2}, "-"),
            Row("mamba", {"kind": "mamba"}, "-"),
        ),
        d_model=32,
        hidden=64,
        rates=(4e-3, 1e-2),
    ),
}


def train(table: Table, row: Row, rate: float, seed: int, advance: Any) -> list[float | None]:
    """Right answers of one training: on the examples that choose the rate, at the trained length,
    then in the order of `tests`.
    """
    task = SyntheticTask(table.examples)
    horizon = table.steps * table.batch_size * task.seq_len
    recipe = Recipe(horizon, task.seq_len, table.batch_size, rate, weight_decay=0.0)
    training = Training(build_model(table.spec(row), seed=seed), task, recipe, data_seed=seed)
    if training.run(horizon, advance) is not None:
        return [None] * (2 + len(table.tests))
    scores: list[float | None] = [training.score()]
    for examples in (table.examples, *table.tests.values()):
        test = SyntheticTask(examples, n_held_out=512)
        shape = replace(training.shape, seq_len=test.seq_len)
        with torch.no_grad():
            values = test.score(training.model.eval(), "test", shape)
        scores.append(values.mean(test.metric))
    return scores


def run(table: Table, seeds: int) -> list[dict[str, Any]]:
    """Every row with its scores at its best rate."""
    tokens = table.steps * table.batch_size * SyntheticTask(table.examples).seq_len
    total = len(table.rows) * len(table.rates) * seeds * tokens
    rows = []
    with tqdm(total=total, unit="tok", unit_scale=True, disable=None) as bar:
        for row in table.rows:
            start, found = time.perf_counter(), {}
            for rate in table.rates:
                found[rate] = [train(table, row, rate, s, bar.update) for s in range(seeds)]
            best = max(found, key=lambda rate: statistics.median(s[0] or 0.0 for s in found[rate]))
            rows.append(
                {
                    "name": row.name,
                    "published": row.published,
                    "params": table.spec(row).cost(1).params,
                    "rate": best,
                    "scores": [scores[1:] for scores in found[best]],
                    "seconds": time.perf_counter() - start,
                }
            )
    return rows


def printed(table: Table, rows: list[dict[str, Any]]) -> str:
    """The Markdown table."""
    columns = ["trained length", *table.tests]
    lines = [
        f"{table.source}. Here: {table.n_layers} layers of {table.d_model}, {table.steps} steps "
        f"of {table.batch_size}; {table.examples}; chance {100 * table.examples.chance:.1f} %.",
        "",
        "| mixer | parameters | " + " | ".join(columns) + " | lr | published |",
        "| --- | ---: | " + "---: | " * len(columns) + "---: | --- |",
    ]
    for row in rows:
        cells = []
        for scores in zip(*row["scores"], strict=True):
            known = [100 * s for s in scores if s is not None]
            if len(known) < len(scores):
                cells.append(f"diverged {len(scores) - len(known)} times")
                continue
            low, high = min(known), max(known)
            cells.append(f"{statistics.median(known):.1f} % ({low:.1f} to {high:.1f})")
        figures = f"{row['params']:,} | " + " | ".join(cells) + f" | {row['rate']:g}"
        lines.append(f"| {row['name']} | {figures} | {row['published']} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", nargs="?", choices=list(TABLES))
    parser.add_argument("--list", action="store_true", help="the tables and their sources")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of every training (default: the table's)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    if args.list or args.table is None:
        for name, table in TABLES.items():
            print(f"{name:20} {table.source}")
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    table = TABLES[args.table]
    if args.steps:
        table = replace(table, steps=args.steps)
    rows = run(table, args.seeds)
    print(json.dumps(rows) if args.json else printed(table, rows))


if __name__ == "__main__":
    main()
