"""Byte text for training and scoring: where it comes from, how it is split, what a model must beat.

Glossary
    tokens      (n,) uint8, one byte per token; 256 symbols, no tokenizer
    train       the bytes that training windows are drawn from
    held_out    the bytes that scores and baselines are computed on; disjoint from train
    IGNORE      target id without a loss; the default `ignore_index` of torch's cross_entropy
    bits/byte   mean of -log2 p(byte | earlier bytes): nats per byte / ln 2
"""

import hashlib
import importlib
import lzma
import math
import os
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kizzasi.errors import DataError

IGNORE = -100
HELD_OUT_BLOCK = 4096  # longest held-out stretch; many stretches sample the whole text
MIN_HELD_OUT_BLOCKS = 4
DUPLICATE_CHUNK = 16 << 20  # bounds the memory of duplicate_share
XZ_WINDOW = 32 << 20  # bounds the compressor's memory, 11 times as much
# Tests and installed packages; and two folders of tables and prose that mostly repeat themselves.
NOT_STANDARD_LIBRARY_CODE = frozenset(
    ["site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"]
)


@dataclass(frozen=True, eq=False)
class ByteCorpus:
    """A text as bytes, split once into what is trained on and what is scored.

    Args:
        name: where it came from, as given to `load_corpus`.
        train: (n_train,) uint8.
        held_out: (n_held_out,) uint8.
        digest: sha256 over both splits; equal digests mean equal scores are comparable.
        n_bytes: n_train + n_held_out.
    """

    name: str
    train: Tensor
    held_out: Tensor
    digest: str
    n_bytes: int


def load_corpus(
    source: str | Path | None = None,
    *,
    held_out_fraction: float = 0.1,
    max_bytes: int | None = None,
) -> ByteCorpus:
    """Read bytes and hold out whole blocks of them, spread evenly over the text.

    The text is cut into blocks of at most 4096 bytes, short enough for four held-out ones. Block i
    is held out where floor((i+1) f + 1/2) > floor(i f + 1/2), f = held_out_fraction: every tenth
    block at the default, starting with the fifth. Each split is its blocks joined in order, so no
    training window can contain a held-out byte. At a join the text jumps, for every model alike.

    Text that occurs twice can still stand on both sides of the split. Python's documentation
    quotes itself so much that a fifth of what is held out would be in train verbatim, so a
    paragraph that repeats an earlier one is left out of it. A file that repeats another file of its
    folder is left out too. The bytes within a file of yours are never touched, since repeated lines
    belong to what, say, a log is; `duplicate_share` says how much of the held-out text they are.

    Args:
        source: None for the documentation that ships with CPython (`pydoc_data.topics`, 0.4 MB);
            "stdlib" for the standard library's .py files (10 MB) without tests, codec tables and
            that documentation; otherwise a file, or a folder: every regular file under it, sorted,
            symbolic links not followed. A folder that is called stdlib is "./stdlib".
        held_out_fraction: share of the blocks that is scored and never trained on, in (0, 1).
        max_bytes: use this many bytes from the start of the text.

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
    if source is None:
        name, text = "pydoc_data.topics", _language_reference()
    elif source == "stdlib":
        name, text = "stdlib", _read_files(_standard_library(), max_bytes)
    else:
        name, text = str(source), _read_files(_files_of(Path(source)), max_bytes)
    text = text[:max_bytes]
    if not text:
        raise DataError(f"{name}: no bytes to learn from; give a file or a folder with text in it")
    train, held_out = _split(
        torch.frombuffer(bytearray(text), dtype=torch.uint8), held_out_fraction
    )
    if not len(train) or not len(held_out):
        raise DataError(
            f"{name}: {len(text)} bytes are too few to hold out a {held_out_fraction} share of "
            f"them; give at least {math.ceil(2 / min(held_out_fraction, 1 - held_out_fraction))}"
        )
    digest = hashlib.sha256(len(train).to_bytes(8, "big"))
    digest.update(train.numpy().tobytes())
    digest.update(held_out.numpy().tobytes())
    return ByteCorpus(name, train, held_out, digest.hexdigest(), len(text))


def batches(
    tokens: Tensor, seq_len: int, batch_size: int, seed: int, start_step: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw random windows for ever; the batch of a step depends on (seed, step) alone.

        start[step, row] = Philox(key=seed, counter=step)[row] mod (n - seq_len)
        inputs = tokens[start : start + seq_len],   targets = the same, one byte later

    A training resumed at step k with `start_step=k` sees the batches of the uninterrupted one.

    Args:
        tokens: (n,) uint8, on any device.
        seed: 0 <= seed < 2**128.

    Yields:
        inputs and targets, (b, t) long, on the device of tokens.

    Raises:
        DataError: fewer than seq_len + 1 bytes.
    """
    _require(tokens, seq_len, seq_len + 1)

    def draw() -> Iterator[tuple[Tensor, Tensor]]:
        offsets = torch.arange(seq_len, device=tokens.device)
        step = start_step
        while True:
            # The block counter's upper half is the step, so steps never share random numbers.
            random = np.random.Philox(key=seed, counter=step << 128).random_raw(batch_size)
            starts = (random % np.uint64(len(tokens) - seq_len)).astype(np.int64)
            index = torch.from_numpy(starts).to(tokens.device)[:, None] + offsets
            yield tokens[index].long(), tokens[index + 1].long()
            step += 1

    return draw()


def held_out_windows(tokens: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """Cut the held-out bytes into consecutive windows in which each byte is a target exactly once.

    The input of a target is the byte before it; before the very first stands byte 0. The last
    window is filled up with input 0 and target IGNORE, which `cross_entropy` skips.

    Args:
        tokens: (n,) uint8.

    Returns:
        inputs and targets, (ceil(n / seq_len), seq_len) long.

    Raises:
        DataError: fewer than seq_len bytes.
    """
    _require(tokens, seq_len, seq_len)
    n_windows = math.ceil(len(tokens) / seq_len)
    inputs = torch.zeros(n_windows * seq_len, dtype=torch.long, device=tokens.device)
    targets = torch.full_like(inputs, IGNORE)
    inputs[1 : len(tokens)] = tokens[:-1]
    targets[: len(tokens)] = tokens
    return inputs.view(n_windows, seq_len), targets.view(n_windows, seq_len)


def baselines(corpus: ByteCorpus) -> dict[str, float]:
    """What the held-out bytes cost without a neural network, in bits per byte.

        unigram   p(b) = (c(b) + 1/2) / (n + 128)
        bigram    p(b | a) = (c(a, b) + k(a) p(b)) / (c(a) + k(a)),  k(a) = distinct successors of a
        xz        8 (size(train + held_out) - size(train)) / n_held_out

    c counts the training bytes. The first held-out byte has no predecessor and costs its unigram.
    xz is raw LZMA2 at its highest preset with a dictionary of up to 64 MiB; of train it is given
    the last 32 MiB.

    Source: Krichevsky & Trofimov 1981 (the 1/2); Witten & Bell 1991, method C (k).
    """
    held_out = corpus.held_out.long()
    unigram, bigram = _byte_models(corpus.train)
    first = unigram[held_out[:1]].log2().sum()
    rest = bigram[held_out[:-1], held_out[1:]].log2().sum()
    context = corpus.train[-XZ_WINDOW:]
    with ThreadPoolExecutor(2) as pool:
        both, alone = pool.map(_xz_size, (torch.cat([context, corpus.held_out]), context))
    return {
        "unigram": -unigram[held_out].log2().mean().item(),
        "bigram": -(first + rest).item() / len(held_out),
        "xz": 8 * (both - alone) / len(held_out),
    }


def duplicate_share(corpus: ByteCorpus, length: int = 64) -> float:
    """Share of the held-out bytes that lie in a stretch which also stands verbatim in train.

    Args:
        corpus: the split text.
        length: shortest stretch that counts, in bytes; rounded up to a power of two.

    Returns:
        0 (nothing is repeated) to 1 (every held-out byte could have been memorised).
    """
    length = 1 << (length - 1).bit_length()
    if min(len(corpus.train), len(corpus.held_out)) < length:
        return 0.0
    sought = _fingerprints(corpus.held_out, length)
    repeated = np.zeros(len(sought), dtype=bool)
    for start in range(0, len(corpus.train) - length + 1, DUPLICATE_CHUNK):
        chunk = corpus.train[start : start + DUPLICATE_CHUNK + length - 1]
        known = np.sort(_fingerprints(chunk, length))
        repeated |= known[np.searchsorted(known, sought).clip(max=len(known) - 1)] == sought
    covered = np.convolve(repeated, np.ones(length)) > 0.5
    return float(covered.mean())


def check_vocab(vocab_size: int, corpus: ByteCorpus) -> None:
    """Refuse data with a byte that a model of this vocabulary has no embedding for.

    Raises:
        DataError: names the largest byte and the smallest vocab_size that fits.
    """
    largest = max(int(corpus.train.max()), int(corpus.held_out.max()))
    if largest >= vocab_size:
        raise DataError(
            f"{corpus.name}: holds byte {largest}, but vocab_size={vocab_size} has ids 0 to "
            f"{vocab_size - 1}; set vocab_size to {largest + 1} or more (256 fits any data)"
        )


def _language_reference() -> bytes:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError(
            "this Python came without pydoc_data.topics, the default text; "
            "pass --data FILE_OR_FOLDER"
        ) from error
    joined = "\n\n".join(topics[key] for key in sorted(topics))
    # Topics quote each other at length; dict keeps the first of equal paragraphs, in order.
    return "\n\n".join(dict.fromkeys(joined.split("\n\n"))).encode()


def _standard_library() -> Iterator[Path]:
    files = _files_of(Path(sysconfig.get_path("stdlib")), NOT_STANDARD_LIBRARY_CODE)
    return (path for path in files if path.suffix == ".py")


def _files_of(root: Path, skipped: frozenset[str] = frozenset()) -> Iterator[Path]:
    """The file itself, or every regular file of the folder: its own, sorted, then its folders'."""
    if os.path.isfile(root):
        yield root
        return
    if not os.path.isdir(root):
        found = os.path.exists(root)
        rule = "is neither a file nor a folder" if found else "is not there, or out of reach"
        raise DataError(f"{root}: {rule}; pass --data FILE_OR_FOLDER")

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}; make the folder readable or move it")

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = sorted(set(folders) - skipped)
        for path in (Path(folder, file) for file in sorted(files)):
            if path.is_file() and not path.is_symlink():
                yield path


def _read_files(paths: Iterator[Path], max_bytes: int | None) -> bytes:
    """Join the files, each once, and stop when there are enough bytes."""
    text, seen = bytearray(), set[bytes]()
    for path in paths:
        try:
            with path.open("rb") as file:
                piece = file.read(-1 if max_bytes is None else max_bytes - len(text))
        except OSError as error:
            raise DataError(
                f"{path}: {error.strerror}; make the file readable or move it out of the data"
            ) from error
        key = hashlib.sha256(piece).digest()
        if key not in seen:
            seen.add(key)
            text += piece
        if len(text) == max_bytes:
            break
    return bytes(text)


def _split(tokens: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    smaller_share = min(fraction, 1 - fraction)
    block_size = min(HELD_OUT_BLOCK, math.ceil(len(tokens) * smaller_share / MIN_HELD_OUT_BLOCKS))
    parts: tuple[list[Tensor], list[Tensor]] = ([tokens[:0]], [tokens[:0]])
    for i, block in enumerate(tokens.split(block_size)):
        held = math.floor((i + 1) * fraction + 0.5) > math.floor(i * fraction + 0.5)
        parts[held].append(block)
    return torch.cat(parts[0]), torch.cat(parts[1])


def _require(tokens: Tensor, seq_len: int, needed: int) -> None:
    if seq_len < 1:
        raise DataError(f"seq_len={seq_len}: must be at least 1")
    if len(tokens) < needed:
        raise DataError(
            f"this split of the data has {len(tokens)} bytes, and seq_len={seq_len} needs at "
            f"least {needed}; give more data or a shorter seq_len (a tenth is held out by default)"
        )


def _byte_models(train: Tensor) -> tuple[Tensor, Tensor]:
    """p(b) (256,) and p(b | a) (256, 256) float64 as in `baselines`."""
    unigram = (torch.bincount(train, minlength=256).double() + 0.5) / (len(train) + 128)
    pair_ids = train[:-1].int() * 256 + train[1:]
    pairs = torch.bincount(pair_ids, minlength=256 * 256).double().view(256, 256)
    successors = (pairs > 0).sum(1, keepdim=True).clamp(min=1)
    return unigram, (pairs + successors * unigram) / (pairs.sum(1, keepdim=True) + successors)


def _xz_size(tokens: Tensor) -> int:
    dictionary_bytes = min(max(len(tokens), 4096), 2 * XZ_WINDOW)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": dictionary_bytes}]
    return len(lzma.compress(tokens.numpy().tobytes(), lzma.FORMAT_RAW, filters=filters))


def _fingerprints(tokens: Tensor, length: int) -> np.ndarray:
    """A 64-bit hash of every stretch of `length` bytes, by doubling: h2n[i] = h_n[i] B + h_n[i+n].

    Arithmetic is modulo 2**64; B is another odd constant at each doubling.
    """
    hashes = tokens.numpy().astype(np.uint64) + np.uint64(1)
    width, multiplier = 1, 0x9E3779B97F4A7C15
    while width < length:
        hashes = hashes[:-width] * np.uint64(multiplier) + hashes[width:]
        multiplier = (multiplier * 0xD1342543DE82EF95 + 2) % 2**64
        width *= 2
    return hashes
