"""The task that a file or folder stands for; what is nothing of them is refused, never guessed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from kizzasi.errors import DataError
from kizzasi.train.bytes import ByteText, load_corpus, with_test
from kizzasi.train.frames import Frames
from kizzasi.train.labels import Labels
from kizzasi.train.task import Task
from kizzasi.train.token_ids import TokenIds

BUILTIN = "builtin"  # the text that ships with CPython
NOT_TEXT = (".png", ".jpg", ".jpeg", ".gif", ".pt", ".pth", ".safetensors", ".zip", ".pdf", ".mp3")


def open_task(
    source: str | Path | None = None,
    *,
    test_fraction: float = 0.1,
    max_bytes: int | None = None,
    apart: Path | None = None,
    test: str | Path | None = None,
) -> Task:
    """Find out what kind of data this is.

    | source | task |
    |---|---|
    | None or "builtin", "stdlib", a folder, any other file | `ByteText` |
    | .bin, .npy of whole numbers in one row | `TokenIds` |
    | .csv, .wav, .parquet, .npy of other numbers | `Frames` |
    | .npz with x and y | `Labels` |

    Args:
        source: see there.
        test_fraction: share that nobody looks at before the result.
        max_bytes: of text.
        apart: a folder that a run writes into, which is never part of the data.
        test: a text of its own, in place of a share; for text alone.

    Raises:
        DataError: nothing there, or a file of a kind that no task reads.
    """
    if test is not None:
        task = open_task(source, test_fraction=0.0, max_bytes=max_bytes, apart=apart)
        if not isinstance(task, ByteText):
            raise DataError(f"{test}: a test file of its own is for text; {source} is none")
        return with_test(task, test)
    if source == BUILTIN and not os.path.exists(BUILTIN):
        source = None
    path = Path(source or "")
    suffix = path.suffix.lower()
    if source is None or source == "stdlib" or path.is_dir():
        return load_corpus(source, test_fraction=test_fraction, max_bytes=max_bytes, apart=apart)
    if suffix in NOT_TEXT:
        raise DataError(
            f"{source}: a {suffix} file is no text; give text, ids (.bin, .npy), frames (.csv, "
            ".npy, .wav), or labelled sequences (.npz)"
        )
    if suffix == ".npy" and path.is_file():
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{source}: not an array of numbers: {error}") from error
        whole = array.ndim == 1 and array.dtype.kind in "ui"
        opened = TokenIds.open if whole else Frames.open
        return opened(path, test_fraction=test_fraction)
    if suffix == ".bin":
        return TokenIds.open(path, test_fraction=test_fraction)
    if suffix in (".csv", ".wav", ".parquet"):
        return Frames.open(path, test_fraction=test_fraction)
    if suffix == ".npz":
        return Labels.open(path, test_fraction=test_fraction)
    return load_corpus(source, test_fraction=test_fraction, max_bytes=max_bytes, apart=apart)
