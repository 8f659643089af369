"""`TokenIds`: ids of any vocabulary in a file, which is mapped and never read as a whole.

The file is cut in order: train first, then valid, then test, so that what is scored comes after
what is learnt.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kizzasi.errors import DataError, SpecError
from kizzasi.models import ModelOutput, Tokens
from kizzasi.train.task import (
    LN2,
    Batch,
    Forward,
    Metric,
    Scores,
    Shape,
    Split,
    scored,
    spread,
    token_bits,
)
from kizzasi.train.windows import starts

PIECE = 1 << 24  # ids looked at together
WHOLE = 1 << 28  # bytes up to which a digest reads all of a file
SAMPLES = 64  # pieces of a larger file that it reads


@dataclass(frozen=True)
class TokenIds:
    """Predict each id from those before it, in bits per token.

    Args:
        path: a .npy of whole numbers, or a .bin of plain ones.
        dtype: of a .bin, "uint16" or "uint32".
        vocab_size: ids are below it.
        n: ids in the file.
        digest: of the file and its splits; of a file above 256 MiB, of 64 pieces of it.
        valid_fraction, test_fraction: shares at the end of the file.
        device: where batches go.
    """

    path: str
    dtype: str
    vocab_size: int
    n: int
    digest: str
    valid_fraction: float = 0.05
    test_fraction: float = 0.05
    device: str = "cpu"

    metric: Metric = field(default=Metric("bits/token"), init=False)
    curve_scale: float = field(default=1 / LN2, init=False)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        vocab_size: int | None = None,
        dtype: str = "uint16",
        valid_fraction: float = 0.05,
        test_fraction: float = 0.05,
    ) -> TokenIds:
        """Look at a file once.

        Args:
            path: a .npy or .bin file.
            vocab_size: None takes the largest id and one.
            dtype: of a .bin.
            valid_fraction, test_fraction: of the ids, in [0, 1).

        Raises:
            DataError: unreadable, not whole numbers, negative, or above the vocabulary.
        """
        if not (valid_fraction > 0 and test_fraction >= 0 and valid_fraction + test_fraction < 1):
            raise DataError(
                f"valid_fraction={valid_fraction}, test_fraction={test_fraction}: leave nothing to "
                "train on; 0.05 each is usual"
            )
        ids = _mapped(str(path), dtype)
        low = min((int(ids[i : i + PIECE].min()) for i in range(0, len(ids), PIECE)), default=-1)
        high = max((int(ids[i : i + PIECE].max()) for i in range(0, len(ids), PIECE)), default=-1)
        wanted = high + 1 if vocab_size is None else vocab_size
        if low < 0 or high >= wanted:
            raise DataError(
                f"{path}: ids lie in {low} .. {high}, and the vocabulary has {wanted}; give "
                "vocab_size above the largest id, and the dtype that the file was written with"
            )
        shares = f"{valid_fraction} {test_fraction}"
        digest = _digest(ids, shares)
        fractions = valid_fraction, test_fraction
        return cls(str(path), dtype, wanted, len(ids), digest, *fractions)

    @property
    def name(self) -> str:
        return self.path

    @property
    def stem(self) -> Tokens:
        return Tokens(self.vocab_size)

    @property
    def ceiling(self) -> float:
        return 2 * math.log(max(2, self.vocab_size))

    def check(self, shape: Shape, stem: object) -> None:
        """Raises SpecError for a smaller vocabulary, DataError if a split is below a window."""
        if not isinstance(stem, Tokens) or stem.vocab_size < self.vocab_size:
            raise SpecError(f"stem: {self.path} needs Tokens({self.vocab_size})")
        for split in ("train", "valid"):
            low, high = self._ends(split)
            if high - low < shape.seq_len + 1:
                raise DataError(
                    f"{self.path}: {split} has {high - low} ids, and seq_len={shape.seq_len} needs "
                    f"{shape.seq_len + 1}; give more data or a shorter seq_len"
                )

    def to(self, device: torch.device) -> TokenIds:
        return replace(self, device=str(device))

    def batches(self, split: Split, seed: int, step: int, shape: Shape) -> Iterator[Batch]:
        ids, (low, high) = _mapped(self.path, self.dtype), self._ends(split)
        while True:
            first = low + starts(high - low - shape.seq_len, seed, step, shape.batch_size)
            yield Batch(*self._rows(ids, first, shape.seq_len))
            step += 1

    def loss(self, out: ModelOutput, batch: Batch) -> Tensor:
        """Nats per token."""
        return out.loss(batch.targets)

    def score(self, model: Forward, split: Split, shape: Shape) -> Scores:
        """Bits per token of windows that follow each other; each starts from an empty state."""
        low, high = self._ends(split)
        first = torch.arange(low, high - shape.seq_len, shape.seq_len)
        chosen = first[spread(len(first), shape.score_windows)].numpy()
        rows = self._rows(_mapped(self.path, self.dtype), chosen, shape.seq_len)
        return scored(model, *rows, shape, token_bits)

    def has(self, split: Split) -> bool:
        low, high = self._ends(split)
        return high > low

    def baselines(self) -> dict[str, float]:
        """unigram: p(i) = (c(i) + 1/2) / (n + v / 2), counted on train."""
        ids, (low, high) = _mapped(self.path, self.dtype), self._ends("train")
        counts = np.zeros(self.vocab_size)
        for i in range(low, high, PIECE):
            counts += np.bincount(ids[i : min(i + PIECE, high)], minlength=self.vocab_size)
        p = (counts + 0.5) / (high - low + self.vocab_size / 2)
        low, high = self._ends("valid")
        return {"unigram": float(-np.log2(p[ids[low:high].astype(np.int64)]).mean())}

    def facts(self) -> dict[str, Any]:
        sizes = {f"n_{split}": high - low for split, (low, high) in self._all_ends().items()}
        return {"kind": "token ids", "vocab_size": self.vocab_size, **sizes}

    def _ends(self, split: Split) -> tuple[int, int]:
        return self._all_ends()[split]

    def _all_ends(self) -> dict[str, tuple[int, int]]:
        test = self.n - round(self.n * self.test_fraction)
        valid = test - round(self.n * self.valid_fraction)
        return {"train": (0, valid), "valid": (valid, test), "test": (test, self.n)}

    def _rows(self, ids: np.ndarray, first: np.ndarray, seq_len: int) -> tuple[Tensor, Tensor]:
        rows = np.stack([ids[i : i + seq_len + 1] for i in first]).astype(np.int64)
        whole = torch.from_numpy(rows).to(self.device)
        return whole[:, :-1], whole[:, 1:]


def _mapped(path: str, dtype: str) -> np.ndarray:
    try:
        if Path(path).suffix == ".npy":
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            ids = np.memmap(path, dtype=np.dtype(dtype), mode="r")
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a file of ids: {error}") from error
    if ids.ndim != 1 or ids.dtype.kind not in "ui":
        raise DataError(
            f"{path}: shape {ids.shape} of {ids.dtype}, expected whole numbers in one row"
        )
    return ids


def _digest(ids: np.ndarray, shares: str) -> str:
    digest = hashlib.sha256(f"{len(ids)} {ids.dtype} {shares}".encode())
    if ids.nbytes <= WHOLE:
        pieces = range(0, len(ids), PIECE)
    else:
        pieces = np.linspace(0, len(ids) - PIECE // 16, SAMPLES).astype(int).tolist()
    for i in pieces:
        size = PIECE if ids.nbytes <= WHOLE else PIECE // 16
        digest.update(np.ascontiguousarray(ids[i : i + size]).tobytes())
    return digest.hexdigest()
