"""Tables on trainings rather than mixers: Muon beside AdamW, and rates carried over by muP."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kizzasi.train import load_corpus
from reproductions.synthetic import ATTENTION, HEADS, MAMBA2, RWKV7
from reproductions.table import Problem, Row, Table

SEQ_LEN = 128
FAMILIES = {
    "attention": ATTENTION,
    "s4d": {"kind": "s4d", "d_state": 32},
    "mamba": {"kind": "mamba"},
    "mamba2": MAMBA2,
    "rwkv7": RWKV7,
    "gated_delta": {"kind": "gated_delta", **HEADS},
}
WIDTHS, BASE = (64, 128), 32


def text(_data: Path | None) -> Problem:
    """The text that ships with Python."""
    task = load_corpus(test_fraction=0.1)
    return Problem(task, SEQ_LEN, {"test": (task, SEQ_LEN)})


def both(name: str) -> tuple[Row, Row]:
    """A family under each optimizer, at rates of its own."""
    row = Row(f"{name}, adamw", FAMILIES[name], rates=(8e-3, 4e-3))
    gain = "half of AdamW's compute"
    muon = replace(row, name=f"{name}, muon", optimizer="muon", rates=(3.2e-2, 1.6e-2))
    return row, replace(muon, published=gain)


def widths() -> tuple[Row, ...]:
    """The base, and wider models at its rates: as they are, and carried over."""
    rows = [Row(f"width {BASE}", FAMILIES["mamba"], "the base", d_model=BASE)]
    for width in WIDTHS:
        plain = Row(f"width {width}", FAMILIES["mamba"], "the best rate falls", d_model=width)
        told = "the best rate stays"
        rows += [plain, replace(plain, name=f"{plain.name}, muP", base=BASE, published=told)]
    return tuple(rows)


TRAININGS: dict[str, Table] = {
    "bytes": Table(
        source="Muon is Scalable for LLM Training, arXiv:2502.16982",
        what=f"the text that ships with Python, windows of {SEQ_LEN} bytes",
        problem=text,
        rows=tuple(row for name in FAMILIES for row in both(name)),
        hidden=128,
        steps=300,
        batch_size=8,
        weight_decay=0.1,
    ),
    "mup": Table(
        source="Yang et al. 2022, arXiv:2203.03466, figure 1",
        what=f"the text that ships with Python, windows of {SEQ_LEN} bytes",
        problem=text,
        rows=widths(),
        d_model=BASE,
        hidden=2 * BASE,
        steps=200,
        batch_size=8,
        weight_decay=0.1,
        rates=(4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
        by_rate=True,
    ),
}
