"""`Frames`: signals of one or more channels, to be forecast some frames ahead.

The signal is cut in order: train, valid, test. Every channel is shifted and scaled by its mean and
standard deviation over train, and scores are in that scale.

Glossary
    x[t]   (c,) the frame at time t, normalised
    h      horizon: what is forecast from x[..t] is x[t + h]
"""

from __future__ import annotations

import csv
import hashlib
import math
import wave
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kizzasi.errors import DataError, SpecError
from kizzasi.models import ModelOutput, Signal
from kizzasi.train.task import Batch, Forward, Metric, Scores, Shape, Split, scored, spread
from kizzasi.train.windows import starts

Error = Literal["MSE", "MAE", "NRMSE"]
AR_ORDER = 8
LONGEST_PERIOD = 400


@dataclass(frozen=True, eq=False)
class Frames:
    """Forecast a signal.

    Args:
        name: where it came from.
        values: (n, c) float32, normalised.
        columns: names of the channels.
        digest: of the values and all that follows.
        horizon: h, at least 1.
        error: the metric.
        valid_fraction, test_fraction: shares at the end.
        left_out: columns that hold no numbers.
    """

    name: str
    values: Tensor
    columns: tuple[str, ...]
    digest: str
    horizon: int = 1
    error: Error = "MSE"
    valid_fraction: float = 0.1
    test_fraction: float = 0.1
    left_out: tuple[str, ...] = ()

    ceiling: float = field(default=math.inf, init=False)
    curve_scale: float = field(default=1.0, init=False)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        horizon: int = 1,
        error: Error = "MSE",
        valid_fraction: float = 0.1,
        test_fraction: float = 0.1,
    ) -> Frames:
        """Read a .csv (with or without a header), .npy (n,) or (n, c), .wav or .parquet file.

        Raises:
            DataError: unreadable, no numbers, gaps in them, or too short.
        """
        raw, columns, left_out = _read(Path(path))
        return cls.of(
            str(path),
            raw,
            columns,
            horizon=horizon,
            error=error,
            valid_fraction=valid_fraction,
            test_fraction=test_fraction,
            left_out=left_out,
        )

    @classmethod
    def of(
        cls,
        name: str,
        raw: np.ndarray,
        columns: tuple[str, ...] = (),
        *,
        horizon: int = 1,
        error: Error = "MSE",
        valid_fraction: float = 0.1,
        test_fraction: float = 0.1,
        left_out: tuple[str, ...] = (),
    ) -> Frames:
        """From values (n,) or (n, c) of your own. Raises DataError."""
        raw = np.asarray(raw, np.float64)
        raw = raw[:, None] if raw.ndim == 1 else raw
        if raw.ndim != 2 or not raw.size or not np.isfinite(raw).all():
            raise DataError(f"{name}: expected finite numbers (frames, channels), got {raw.shape}")
        if horizon < 1 or not 0 < valid_fraction <= valid_fraction + test_fraction < 1:
            raise DataError(f"{name}: horizon {horizon} must be above 0, and splits leave a train")
        train = raw[: _ends(len(raw), valid_fraction, test_fraction)["train"][1]]
        scale = train.std(0)
        normal = (raw - train.mean(0)) / np.where(scale > 0, scale, 1.0)
        values = torch.from_numpy(normal.astype(np.float32))
        facts = f"{values.shape} {horizon} {error} {valid_fraction} {test_fraction}"
        digest = hashlib.sha256(facts.encode() + values.numpy().tobytes()).hexdigest()
        columns = columns or tuple(f"channel {i}" for i in range(raw.shape[1]))
        shares = valid_fraction, test_fraction
        return cls(name, values, columns, digest, horizon, error, *shares, left_out)

    @property
    def stem(self) -> Signal:
        return Signal(self.values.shape[1], self.values.shape[1])

    @property
    def metric(self) -> Metric:
        return Metric(self.error, root=self.error == "NRMSE", of_loss=self.error == "MSE")

    def check(self, shape: Shape, stem: object) -> None:
        """Raises SpecError for another stem, DataError if a split is below a window."""
        if stem != self.stem:
            raise SpecError(f"stem: {self.name} needs {self.stem}")
        for split in ("train", "valid"):
            low, high = self._ends(split)
            need = shape.seq_len + self.horizon
            if high - low < need:
                raise DataError(
                    f"{self.name}: {split} has {high - low} frames, and windows need {need}; give "
                    "more data or a shorter seq_len"
                )

    def to(self, device: torch.device) -> Frames:
        return replace(self, values=self.values.to(device))

    def batches(self, split: Split, seed: int, step: int, shape: Shape) -> Iterator[Batch]:
        low, high = self._ends(split)
        n = high - low - shape.seq_len - self.horizon + 1
        while True:
            yield self._rows(low + starts(n, seed, step, shape.batch_size), shape.seq_len)
            step += 1

    def loss(self, out: ModelOutput, batch: Batch) -> Tensor:
        """The mean squared error."""
        return out.loss(batch.targets)

    def score(self, model: Forward, split: Split, shape: Shape) -> Scores:
        """The error on windows that follow each other; each starts from an empty state."""
        low, high = self._ends(split)
        first = torch.arange(low, high - shape.seq_len - self.horizon + 1, shape.seq_len)
        chosen = first[spread(len(first), shape.score_windows)].numpy()
        return scored(model, *self._rows(chosen, shape.seq_len), shape, self._errors)

    def has(self, split: Split) -> bool:
        low, high = self._ends(split)
        return high - low > self.horizon

    def baselines(self) -> dict[str, float]:
        """Scores on valid without a neural network.

        persistence   x[t]
        seasonal      x[t + h - k p], p the period of highest autocorrelation in train
        linear AR     least squares on the last 8 frames of all channels, fitted on train
        """
        x, h = self.values.cpu().double().numpy(), self.horizon
        low, high = self._ends("valid")
        now = np.arange(low, high - h)
        period = _period(x[: self._ends("train")[1]])
        lag = -(-h // period) * period
        ahead = {"persistence": x[now], "seasonal": x[np.maximum(now + h - lag, 0)]}
        ahead["linear AR"] = _linear(x, self._ends("train")[1], now, h)
        truth = x[now + h]
        return {name: self._summed(guess - truth) for name, guess in ahead.items()}

    def facts(self) -> dict[str, Any]:
        ends = _ends(len(self.values), self.valid_fraction, self.test_fraction)
        sizes = {f"n_{split}": high - low for split, (low, high) in ends.items()}
        left = {"left_out": list(self.left_out)} if self.left_out else {}
        return {"kind": "frames", "channels": list(self.columns), **sizes, **left}

    def _ends(self, split: Split) -> tuple[int, int]:
        return _ends(len(self.values), self.valid_fraction, self.test_fraction)[split]

    def _rows(self, first: np.ndarray, seq_len: int) -> Batch:
        index = torch.from_numpy(first)[:, None] + torch.arange(seq_len)
        index = index.to(self.values.device)
        return Batch(self.values[index], self.values[index + self.horizon])

    def _errors(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        off = outputs.float() - targets
        each = off.abs() if self.error == "MAE" else off.square()
        return each.mean((1, 2)), torch.ones(len(each), device=each.device)

    def _summed(self, off: np.ndarray) -> float:
        if self.error == "MAE":
            return float(np.abs(off).mean())
        mean = float(np.square(off).mean())
        return math.sqrt(mean) if self.error == "NRMSE" else mean


def _ends(n: int, valid: float, test: float) -> dict[str, tuple[int, int]]:
    last = n - round(n * test)
    middle = last - round(n * valid)
    return {"train": (0, middle), "valid": (middle, last), "test": (last, n)}


def _period(train: np.ndarray) -> int:
    """The lag in 2 .. 400 whose autocorrelation is highest, all channels together."""
    lags = range(2, min(LONGEST_PERIOD, len(train) // 3) + 1)
    scores = {lag: float((train[lag:] * train[:-lag]).mean()) for lag in lags}
    return max(scores, key=scores.__getitem__, default=1)


def _linear(x: np.ndarray, n_train: int, now: np.ndarray, h: int) -> np.ndarray:
    """x[t + h] from x[t], x[t - 1], ... of all channels and a constant."""
    order = min(AR_ORDER, max(1, n_train // (4 * x.shape[1])))

    def seen(at: np.ndarray) -> np.ndarray:
        past = [x[np.maximum(at - k, 0)] for k in range(order)]
        return np.concatenate([*past, np.ones((len(at), 1))], 1)

    fitted = np.arange(order - 1, n_train - h)
    weights = np.linalg.lstsq(seen(fitted), x[fitted + h], rcond=None)[0]
    return seen(now) @ weights


def _read(path: Path) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """Values (n, c), names of the columns, and those left out."""
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False), (), ()
        if path.suffix == ".wav":
            return _read_wav(path), (), ()
        if path.suffix == ".parquet":
            return _read_parquet(path)
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, ValueError, wave.Error, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot read frames: {error}") from error
    named = bool(rows) and not all(map(_is_number, rows[0]))
    names = rows[0] if named else [f"column {i}" for i in range(len(rows[0]) if rows else 0)]
    rows = rows[named:]
    if not rows or any(len(row) != len(names) for row in rows):
        raise DataError(f"{path}: no table of numbers; every row needs {len(names)} cells")
    kept = [i for i in range(len(names)) if all(_is_number(row[i]) for row in rows)]
    left = tuple(f"{name}: no numbers" for i, name in enumerate(names) if i not in kept)
    if not kept:
        raise DataError(f"{path}: no column holds numbers alone; fill gaps, or drop such rows")
    values = np.array([[float(row[i]) for i in kept] for row in rows])
    return values, tuple(names[i] for i in kept), left


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _read_wav(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        if file.getsampwidth() != 2:
            raise DataError(f"{path}: {8 * file.getsampwidth()} bits a sample; give 16")
        raw = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return raw.reshape(-1, file.getnchannels()) / 2**15


def _read_parquet(path: Path) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]:
    try:
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError(
            f"{path}: reading parquet takes pyarrow; install it, or give a csv"
        ) from error
    table = parquet.read_table(path).to_pydict()
    kept = {k: v for k, v in table.items() if all(isinstance(x, (int, float)) for x in v)}
    left = tuple(f"{name}: no numbers" for name in table if name not in kept)
    return np.array(list(kept.values()), float).T, tuple(kept), left
