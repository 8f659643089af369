"""Byte text for training and scoring: where it comes from, how it is split, what a model must beat.

Glossary
    tokens      (n,) uint8, one byte per token; 256 symbols, no tokenizer
    train       the bytes that training windows are drawn from
    valid       the bytes that decide, for scores and baselines; disjoint from train
    test        bytes that nobody looks at before the result
    bits/byte   mean of -log2 p(byte | earlier bytes): nats per byte / ln 2
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kizzasi.errors import DataError, SpecError
from kizzasi.models import ModelOutput, Tokens
from kizzasi.train.byte_baselines import baselines, duplicate_share, looked_at, work
from kizzasi.train.files import files_of, language_reference, read_files, standard_library
from kizzasi.train.task import (
    LN2,
    Batch,
    Forward,
    Metric,
    Scores,
    Shape,
    Split,
    Task,
    scored,
    token_bits,
)
from kizzasi.train.windows import batches, held_out_windows, require_enough

HELD_OUT_BLOCK = 4096  # longest held-out stretch; many stretches sample the whole text
MIN_HELD_OUT_BLOCKS = 4
LONG = 4 << 20  # bytes compressed for baselines, which are then counted on a line


@dataclass(frozen=True, eq=False)
class ByteText:
    """A text as bytes: the task of predicting each byte from those before it, in bits/byte.

    Args:
        name: where it came from, as given to `load_corpus`.
        train: (n_train,) uint8.
        valid: (n_valid,) uint8, what decides.
        digest: sha256 over all splits; equal digests mean equal scores are comparable.
        n_bytes: of all splits together.
        test: (n_test,) uint8, read once for the result; there may be none.
        left_out: files that are no text, with the reason.
    """

    name: str
    train: Tensor
    valid: Tensor
    digest: str
    n_bytes: int
    test: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    left_out: tuple[str, ...] = ()

    stem: Tokens = field(default=Tokens(256), init=False)
    metric: Metric = field(default=Metric("bits/byte"), init=False)
    ceiling: float = field(default=2 * math.log(256), init=False)
    curve_scale: float = field(default=1 / LN2, init=False)

    def check(self, shape: Shape, stem: object) -> None:
        """Raise DataError if a split is shorter than a window or a byte has no embedding."""
        if not isinstance(stem, Tokens):
            raise SpecError("stem: training on bytes needs a token stem; use Tokens(256)")
        check_vocab(stem.vocab_size, self)
        require_enough(self.train, shape.seq_len, shape.seq_len + 1)
        require_enough(self.valid, shape.seq_len, shape.seq_len)

    def to(self, device: torch.device) -> ByteText:
        parts = {name: getattr(self, name).to(device) for name in ("train", "valid", "test")}
        return replace(self, **parts)

    def batches(self, split: Split, seed: int, step: int, shape: Shape) -> Iterator[Batch]:
        drawn = batches(self.part(split), shape.seq_len, shape.batch_size, seed, step)
        return (Batch(*pair) for pair in drawn)

    def loss(self, out: ModelOutput, batch: Batch) -> Tensor:
        """Nats per byte."""
        return out.loss(batch.targets)

    def score(self, model: Forward, split: Split, shape: Shape) -> Scores:
        """Bits per byte of every window; each starts from an empty state."""
        tokens, short = self.part(split), split == "test"  # valid is checked before it is scored
        inputs, targets = held_out_windows(tokens, shape.seq_len, shape.score_windows, short=short)
        return scored(model, inputs, targets, shape, token_bits)

    def part(self, split: Split) -> Tensor:
        return {"train": self.train, "valid": self.valid, "test": self.test}[split]

    def has(self, split: Split) -> bool:
        return len(self.part(split)) > 0

    def baselines(self, told: Callable[[int], object] | None = None) -> dict[str, float]:
        """As `byte_baselines.baselines`, which says what `told` is."""
        return baselines(self, told)

    def facts(self) -> dict[str, Any]:
        return {
            "n_bytes": self.n_bytes,
            "n_held_out": len(self.valid),
            "n_test": len(self.test),
            "repeated": duplicate_share(self),
            **({"looked_at": bounds} if (bounds := looked_at(self)) else {}),
            **({"left_out": list(self.left_out)} if self.left_out else {}),
        }


def load_corpus(
    source: str | Path | None = None,
    *,
    held_out_fraction: float = 0.1,
    test_fraction: float = 0.0,
    max_bytes: int | None = None,
    apart: Path | None = None,
) -> ByteText:
    """Read bytes and hold out whole blocks of them, spread evenly over the text.

    The text is cut into blocks of at most 4096 bytes, short enough for four held-out ones. Block i
    is held out where floor((i+1) f + 1/2) > floor(i f + 1/2), f = held_out_fraction: every tenth
    block at the default, starting with the fifth. Of the others it is test where floor((i+1) g) >
    floor(i g), g = test_fraction: every tenth at g = 0.1, starting with the tenth. Each split is
    its blocks joined in order, so no training window can contain a byte of the others. At a join
    the text jumps, for every model alike.

    Text that occurs twice can still stand on both sides of the split. Python's documentation
    quotes itself so much that a fifth of what is held out would be in train verbatim, so a
    paragraph that repeats an earlier one is left out of it. Of a folder, a file that repeats
    another one is left out, and so is what is no text: hidden files and folders (.git), and files
    with a zero byte in their first 8 KiB. Files that end in .gz are unpacked. The bytes within a
    file of yours are never touched, since repeated lines belong to what, say, a log is;
    `duplicate_share` says how much of the held-out text they are.

    Args:
        source: None for the documentation that ships with CPython (`pydoc_data.topics`, 0.4 MB);
            "stdlib" for the standard library's .py files (10 MB) without tests, codec tables and
            that documentation; otherwise a file, or a folder: every regular file under it, sorted,
            symbolic links not followed. A folder that is called stdlib is "./stdlib".
        held_out_fraction: share of the blocks that is scored and never trained on, in (0, 1).
        test_fraction: share of the blocks that nobody looks at before the result, in [0, 1).
        max_bytes: use this many bytes from the start of the text.
        apart: a folder that a run writes into, which is never part of the data.

    Raises:
        DataError: nothing there, empty, unreadable, or too short to split; names the path.

    Differs: the first two texts depend on the Python version; compare scores by `digest`.
    """
    if not 0 < held_out_fraction < 1:
        raise DataError(
            f"held_out_fraction={held_out_fraction}: must lie between 0 and 1; 0.1 is usual"
        )
    if max_bytes is not None and max_bytes < 1:
        raise DataError(f"max_bytes={max_bytes}: must be at least 1")
    if not 0 <= test_fraction < 1 - held_out_fraction:
        raise DataError(f"test_fraction={test_fraction}: leaves nothing to train on; 0.1 is usual")
    left_out: list[str] = []
    if source is None:
        name, text = "pydoc_data.topics", language_reference()
    elif source == "stdlib":
        name, text = "stdlib", read_files(standard_library(), max_bytes)
    else:
        name = str(source)
        listed = left_out if Path(source).is_dir() else None  # a file that is named is wanted
        text = read_files(files_of(Path(source), left_out=left_out, apart=apart), max_bytes, listed)
    text = text[:max_bytes]
    if not text:
        raise DataError(f"{name}: no bytes to learn from; give a file or a folder with text in it")
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    train, held_out, test = _split(tokens, held_out_fraction, test_fraction)
    if not len(train) or not len(held_out):
        raise DataError(
            f"{name}: {len(text)} bytes are too few to hold out a {held_out_fraction} share of "
            f"them; give at least {math.ceil(2 / min(held_out_fraction, 1 - held_out_fraction))}"
        )
    digest = hashlib.sha256(len(train).to_bytes(8, "big"))
    for part in (train, held_out, test):
        digest.update(part.numpy().tobytes())
    found = digest.hexdigest()
    return ByteText(name, train, held_out, found, len(text), test, tuple(left_out))


def with_test(corpus: ByteText, source: str | Path, max_bytes: int | None = None) -> ByteText:
    """The same text with all of another one as its test split, which nobody looks at before the
    result.

    Args:
        corpus: to learn from; a test split of its own stays unused.
        source: a file or folder of text.
        max_bytes: use this many bytes from its start.

    Raises:
        DataError: nothing there, or empty.
    """
    left_out: list[str] = []
    listed = left_out if Path(source).is_dir() else None
    text = read_files(files_of(Path(source), left_out=left_out), max_bytes, listed)[:max_bytes]
    if len(text) < 2:
        raise DataError(f"{source}: no text to test on; give a file or a folder with text in it")
    digest = hashlib.sha256(f"{corpus.digest} test".encode() + text).hexdigest()
    test = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return replace(corpus, test=test, digest=digest)


class Progress(Protocol):
    """Where a program says how far it is, such as a `Line`."""

    def say(self, text: str) -> None: ...

    def count_to(self, total: int | None, done: int = 0, unit: str = "tok") -> None: ...

    def update(self, n: int) -> object: ...


def baselines_of(task: Task, line: Progress) -> dict[str, float]:
    """A task's baselines; of much text they take a while, and a line says how far they are."""
    line.say("baselines")
    if not isinstance(task, ByteText) or work(task) < LONG:
        line.count_to(None)
        return task.baselines()
    line.count_to(work(task), unit="B")
    return task.baselines(line.update)


def check_vocab(vocab_size: int, corpus: ByteText) -> None:
    """Refuse data with a byte that a model of this vocabulary has no embedding for.

    Raises:
        DataError: names the largest byte and the smallest vocab_size that fits.
    """
    largest = max(int(corpus.train.max()), int(corpus.valid.max()))
    if largest >= vocab_size:
        raise DataError(
            f"{corpus.name}: holds byte {largest}, but vocab_size={vocab_size} has ids 0 to "
            f"{vocab_size - 1}; set vocab_size to {largest + 1} or more (256 fits any data)"
        )


def _split(tokens: Tensor, fraction: float, test_fraction: float) -> list[Tensor]:
    smaller_share = min(fraction, 1 - fraction)
    block_size = min(HELD_OUT_BLOCK, math.ceil(len(tokens) * smaller_share / MIN_HELD_OUT_BLOCKS))
    parts: tuple[list[Tensor], ...] = tuple([tokens[:0]] for _ in range(3))
    for i, block in enumerate(tokens.split(block_size)):
        held = math.floor((i + 1) * fraction + 0.5) > math.floor(i * fraction + 0.5)
        tested = math.floor((i + 1) * test_fraction) > math.floor(i * test_fraction)
        parts[1 if held else 2 if tested else 0].append(block)
    return [torch.cat(part) for part in parts]
