"""Tables on recorded data: images as sequences, speech, a genome, signals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kizzasi.train import Labels, Task
from reproductions import data as recorded
from reproductions.synthetic import ATTENTION, HEADS, MAMBA2, RWKV7
from reproductions.table import Problem, Row, Table

S4D = {"kind": "s4d", "d_state": 32}
MAMBA = {"kind": "mamba"}
GATED_DELTA = {"kind": "gated_delta", **HEADS}
SLSTM = {"kind": "slstm", **HEADS}


def known(read: Callable[[Path | None], Task], seq_len: int) -> Callable[[Path | None], Problem]:
    """A problem whose one column is its own test split."""

    def problem(data: Path | None) -> Problem:
        task = read(data)
        length = task.inputs.shape[1] if isinstance(task, Labels) else seq_len
        return Problem(task, length, {"test": (task, length)})

    return problem


def images(mixed: bool, read: Callable[[Path | None], Labels]) -> Callable[[Path | None], Problem]:
    """Images as sequences of pixels, in their order or in another."""
    return known(lambda data: recorded.permuted(read(data)) if mixed else read(data), 0)


def five_rows(s4: str = "-", transformer: str = "-") -> tuple[Row, ...]:
    return (
        Row("attention, rope", ATTENTION, transformer),
        Row("s4d", S4D, s4),
        Row("mamba", MAMBA),
        Row("gated_delta", GATED_DELTA),
        Row("slstm", SLSTM),
    )


IN_ORDER = five_rows("99.6 % (S4)", "98.9 %")
PERMUTED = five_rows("98.7 % (S4)", "97.9 %")
UNPUBLISHED = five_rows()
S4_PAPER = "S4, arXiv:2111.00396: MNIST 28 x 28, {}"
SMALL = {"d_model": 48, "hidden": 96, "rates": (4e-3,)}

IMAGES = {
    "digits": Table(
        source=S4_PAPER.format("in order"),
        what="scikit-learn's digits, 64 pixels in order",
        problem=images(False, recorded.digits),
        rows=IN_ORDER,
        **SMALL,
    ),
    "digits_permuted": Table(
        source=S4_PAPER.format("permuted"),
        what="scikit-learn's digits, 64 pixels in one other order",
        problem=images(True, recorded.digits),
        rows=PERMUTED,
        **SMALL,
    ),
    "fashion": Table(
        source=S4_PAPER.format("in order"),
        what="Fashion-MNIST at 14 x 14, 196 pixels in order",
        problem=images(False, recorded.fashion),
        rows=IN_ORDER,
        score_windows=2000,
        **SMALL,
    ),
    "fashion_permuted": Table(
        source=S4_PAPER.format("permuted"),
        what="Fashion-MNIST at 14 x 14, 196 pixels in one other order",
        problem=images(True, recorded.fashion),
        rows=PERMUTED,
        score_windows=2000,
        **SMALL,
    ),
    "s4d_init": Table(
        source="S4D, arXiv:2206.11893: sCIFAR, 4 layers of 128, both directions, 100 epochs",
        what="Fashion-MNIST at 14 x 14, 196 pixels in order",
        problem=images(False, recorded.fashion),
        rows=(
            Row("s4d, lin", {**S4D, "init": "lin"}, "-"),
            Row("s4d, inv", {**S4D, "init": "inv"}, "as lin"),
            Row("s4d, legs", {**S4D, "init": "legs"}, "as lin"),
            Row("s4d, real", {**S4D, "init": "real"}, "5.5 to 6 points under lin"),
        ),
        score_windows=2000,
        **SMALL,
    ),
}


SIGNALS = {
    "vowels": Table(
        source="Kudo et al. 1999, Pattern Recognition Letters 20: 94.1 % by their own method",
        what="JapaneseVowels, up to 29 frames of 12 channels, nine speakers",
        problem=known(recorded.vowels, 0),
        rows=UNPUBLISHED,
        steps=600,
        d_model=32,
        hidden=64,
        rates=(4e-3,),
    ),
    "forecasting": Table(
        source="Zeng et al. 2022, arXiv:2205.13504: linear maps beat Transformers",
        what="Daphnet's walker, 9 channels, 16 frames ahead",
        problem=known(recorded.walking, 64),
        rows=UNPUBLISHED,
        d_model=32,
        hidden=64,
        rates=(4e-3, 1e-3),
    ),
    "dna": Table(
        source="HyenaDNA, arXiv:2306.15794, and Caduceus, arXiv:2403.03234, on the human genome",
        what="the first million bases of E. coli 536, windows of 256",
        problem=known(recorded.dna, 256),
        rows=(
            Row("attention, rope", ATTENTION),
            Row("long_conv (Hyena's)", {"kind": "long_conv", "max_len": 256}),
            Row("mamba", MAMBA),
            Row("mamba2", MAMBA2),
            Row("rwkv7", RWKV7),
        ),
        batch_size=8,
        hidden=128,
        rates=(4e-3,),
    ),
}

REAL: dict[str, Table] = {**IMAGES, **SIGNALS}
