"""Tables on synthetic tasks: state tracking, copying, recall, and the six tasks of MAD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kizzasi.train.synthetic import (
    MQAR,
    Compression,
    Examples,
    GroupProducts,
    InContextRecall,
    InductionHeads,
    Memorization,
    ModularArithmetic,
    Parity,
    Reverse,
    SelectiveCopying,
)
from reproductions.table import HELD_OUT, Problem, Row, Table, asked

HEADS = {"n_heads": 4}
NEGATIVE = {"kind": "gated_delta", **HEADS, "negative_eigenvalues": True}
MAMBA2 = {"kind": "mamba2", "d_state": 64, "head_dim": 16}
MAMBA3 = {"kind": "mamba3", "d_state": 64, "head_dim": 16}
RWKV7 = {"kind": "rwkv7", "head_dim": 16}
ATTENTION = {"kind": "attention", **HEADS}

STATE_TRACKING = {
    "parity": asked(
        "Mamba-3, arXiv:2603.15569, where training lengths grow from 40 to 160",
        Parity(40),
        {"64": Parity(64, 64), "256": Parity(256, 256)},
        (
            Row("mamba2", MAMBA2, "0.9 % above chance"),
            Row("gated_delta", {"kind": "gated_delta", **HEADS}, "fails (arXiv:2411.12537)"),
            Row("gated_delta, negative", NEGATIVE, "100 %"),
            Row("mamba3", MAMBA3, "100 %"),
            Row("rwkv7", RWKV7, "solves (arXiv:2503.14456)"),
            Row("slstm", {"kind": "slstm", **HEADS}, "solves (arXiv:2405.04517)"),
            Row("attention", ATTENTION, "fails (arXiv:2411.12537)"),
        ),
        (Parity(160), {"batch_size": 256, "steps": 10_000, "rates": (1e-4, 1e-3, 1e-2)}),
        d_model=32,
        n_layers=1,
        rates=(1e-2, 2e-3),
    ),
    "modular_arithmetic": asked(
        "Mamba-3, arXiv:2603.15569: without brackets, tested at 256",
        ModularArithmetic(41),
        {"81": ModularArithmetic(81)},
        (
            Row("mamba2", MAMBA2, "48 % above chance"),
            Row("gated_delta, negative", NEGATIVE, "99 %"),
            Row("mamba3", MAMBA3, "99 %"),
            Row("slstm", {"kind": "slstm", **HEADS}, "-"),
        ),
        (
            ModularArithmetic(161),
            {"n_layers": 3, "batch_size": 256, "steps": 10_000, "rates": (1e-4, 1e-3, 1e-2)},
        ),
    ),
    "group_products": asked(
        "Merrill et al. 2024, arXiv:2404.08819: A5; DeltaProduct, arXiv:2502.10297: S3 to S5",
        GroupProducts("A4", 12),
        {"24": GroupProducts("A4", 24)},
        (
            Row("mamba", {"kind": "mamba"}, "depth grows with length"),
            Row("attention", ATTENTION, "depth grows with length"),
            Row("gated_delta, negative", NEGATIVE, "-"),
            Row("delta_product, 2", {"kind": "delta_product", **HEADS, "n_updates": 2}, "S3, A4"),
            Row("rwkv7", RWKV7, "S5 with two layers"),
            Row("slstm", {"kind": "slstm", **HEADS}, "solves"),
        ),
        n_layers=1,
    ),
    "s5_products": asked(
        "RWKV-7, arXiv:2503.14456: S5 with constant depth; Merrill et al. 2024, arXiv:2404.08819",
        GroupProducts("S5", 8),
        {"16": GroupProducts("S5", 16)},
        (
            Row("mamba", {"kind": "mamba"}, "depth grows with length"),
            Row("delta_product, 2", {"kind": "delta_product", **HEADS, "n_updates": 2}, "-"),
            Row("delta_product, 4", {"kind": "delta_product", **HEADS, "n_updates": 4}, "S5"),
            Row("rwkv7", RWKV7, "S5 with two layers"),
            Row("slstm", {"kind": "slstm", **HEADS}, "solves"),
        ),
        d_model=128,
    ),
}

RECALL = {
    "selective_copying": asked(
        "Mamba, arXiv:2312.00752, table 1",
        SelectiveCopying(16, 64, 8),
        {},
        (
            Row("s4", {"kind": "s4", "d_state": 16}, "18.3 %"),
            Row("s4d", {"kind": "s4d", "d_state": 16}, "-"),
            Row("long_conv", {"kind": "long_conv", "max_len": 64}, "30.1 % (in H3)"),
            Row("mamba", {"kind": "mamba"}, "97.0 % (S6), 99.8 %"),
        ),
        (SelectiveCopying(16, 4096, 16), {"steps": 400_000, "batch_size": 64, "rates": (1e-4,)}),
        rates=(4e-3, 1e-3),
    ),
    "induction_heads": asked(
        "Mamba, arXiv:2312.00752, table 2: tested up to 2^20",
        InductionHeads(16, 64),
        {str(n): InductionHeads(16, n) for n in (128, 256, 1024)},
        (
            Row("attention, rope", ATTENTION, "83.6 % at 2 times, 31.3 % at 4"),
            Row("retention (xPos)", {"kind": "retention", **HEADS}, "-"),
            Row("mamba", {"kind": "mamba"}, "100 % at every length"),
            Row("gated_delta", {"kind": "gated_delta", **HEADS}, "-"),
        ),
        (InductionHeads(16, 256), {"steps": 204_800, "batch_size": 8, "rates": (2e-4, 1e-3)}),
        steps=4000,
        rates=(4e-3, 1e-3),
    ),
    "mqar": asked(
        "Zoology, arXiv:2312.04927; Mamba-2, arXiv:2405.21060, figure 8: more state recalls more",
        MQAR(64, 64, 8),
        {"16 pairs": MQAR(64, 128, 16)},
        (
            Row("attention", ATTENTION, "solves at every width"),
            Row("rwkv4", {"kind": "rwkv4"}, "needs width"),
            Row("mamba, d_state 4", {"kind": "mamba", "d_state": 4}, "-"),
            Row("mamba, d_state 16", {"kind": "mamba", "d_state": 16}, "below mamba2"),
            Row("mamba2, d_state 16", {**MAMBA2, "d_state": 16}, "below attention"),
            Row("mamba2, d_state 64", MAMBA2, "as attention"),
            Row("gated_delta", {"kind": "gated_delta", **HEADS}, "solves (arXiv:2412.06464)"),
        ),
        (
            MQAR(8192, 256, 16),
            {"steps": 25_000, "batch_size": 256, "rates": (1e-4, 4.6e-4, 2.2e-3, 1e-2)},
        ),
        rates=(4e-3, 1e-3),
    ),
    "reverse": asked(
        "RWKV-LM's demonstration: numbers of up to 60 digits",
        Reverse(12),
        {},
        (
            Row("rwkv7", RWKV7, "100 %"),
            Row("gated_delta", {"kind": "gated_delta", "n_heads": 2}, "-"),
            Row("mamba", {"kind": "mamba"}, "-"),
        ),
        (Reverse(60), {"steps": 10_000, "batch_size": 256, "rates": (4e-3,)}),
        d_model=32,
        hidden=64,
        rates=(1e-2, 4e-3),
    ),
}

MAD_ROWS = (
    Row("attention", ATTENTION),
    Row("mamba", {"kind": "mamba", "d_state": 4}),
    Row("gated_delta", {"kind": "gated_delta", **HEADS}),
    Row("s4d", {"kind": "s4d", "d_state": 16}),
)
MAD = "MAD, arXiv:2403.17844: multi-head attention and Mamba of equal state"
MAD_SETTING = {
    "d_model": 128,
    "hidden": 256,
    "steps": 20_000,
    "batch_size": 128,
    "rates": (1e-4, 5e-4, 1e-3),
}


def mad(small: Examples, whole: Examples) -> Table:
    """One of MAD's tasks: two layers, each followed by SwiGLU."""
    small_size: dict[str, Any] = {"hidden": 128, "rates": (4e-3, 1e-3)}
    return asked(MAD, small, {}, MAD_ROWS, (whole, MAD_SETTING), **small_size)


def compression(task: Compression) -> dict[str, Any]:
    """The fields of a table on a task that is no generator of examples."""

    def problem(_data: Path | None) -> Problem:
        test = Compression(task.vocab_size, task.n_tokens, HELD_OUT)
        return Problem(task, task.seq_len, {"trained length": (test, test.seq_len)})

    return {"what": f"Compression({task.vocab_size}, {task.n_tokens})", "problem": problem}


SIX = {
    "mad_recall": mad(InContextRecall(8, 64), InContextRecall(8, 128)),
    "mad_fuzzy": mad(InContextRecall(4, 64, motif=2), InContextRecall(8, 128, motif=3)),
    "mad_noisy": mad(InContextRecall(8, 64, noise=0.2), InContextRecall(8, 128, noise=0.2)),
    "mad_copying": mad(SelectiveCopying(16, 64, 8), SelectiveCopying(16, 256, 16)),
    "mad_memorization": mad(Memorization(64, 32), Memorization(128, 32)),
    "mad_compression": Table(
        source=MAD,
        rows=MAD_ROWS,
        hidden=128,
        rates=(4e-3, 1e-3),
        **compression(Compression(8, 16)),
        published={**MAD_SETTING, **compression(Compression(16, 32))},
    ),
}

SYNTHETIC: dict[str, Table] = {**STATE_TRACKING, **RECALL, **SIX}
