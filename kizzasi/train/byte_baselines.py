"""What a byte model must beat, and how much of what it is scored on it could have memorised.

All of it is bounded: of much text a part is looked at, and `looked_at` says which.
"""

from __future__ import annotations

import lzma
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kizzasi.train.task import spread

CHUNK = 16 << 20  # bytes of train looked at together
XZ_WINDOW = 16 << 20  # bounds the compressor's time, and its memory, 11 times as much
HELD_OUT = 4 << 20  # bytes of the held-out text that are looked at
STRETCH = 4096  # of which they consist, as far as they are not all
PIECE = 1 << 18  # bytes compressed between two looks at the clock
BITS = 26  # of a fingerprint, that say at once whether it can be among those sought


class Halves(Protocol):
    """A split text: what is learnt from, and what is scored."""

    @property
    def train(self) -> Tensor: ...

    @property
    def valid(self) -> Tensor: ...


def held_out_part(corpus: Halves) -> Tensor:
    """The held-out bytes, or 4 MiB of them in stretches that are evenly spread."""
    valid = corpus.valid.cpu()
    if len(valid) <= HELD_OUT:
        return valid
    chosen = spread(len(valid) // STRETCH, HELD_OUT // STRETCH)
    return valid[: len(valid) // STRETCH * STRETCH].view(-1, STRETCH)[chosen].flatten()


def looked_at(corpus: Halves) -> str:
    """What is said of bounds where they had to bound; else nothing."""
    n_train, n_valid, parts = len(corpus.train), len(corpus.valid), list[str]()
    if n_valid > HELD_OUT:
        parts.append(f"{HELD_OUT:,} of {n_valid:,} held-out bytes, evenly spread")
    if n_train > XZ_WINDOW:
        parts.append(f"xz learns from the last {XZ_WINDOW:,} of {n_train:,}")
    return "; ".join(parts)


def work(corpus: Halves) -> int:
    """Bytes that `baselines` compresses, which is what takes long."""
    context, held_out = min(len(corpus.train), XZ_WINDOW), min(len(corpus.valid), HELD_OUT)
    return 2 * context + held_out


def baselines(corpus: Halves, told: Callable[[int], object] | None = None) -> dict[str, float]:
    """What the held-out bytes cost without a neural network, in bits per byte.

        unigram   p(b) = (c(b) + 1/2) / (n + 128)
        bigram    p(b | a) = (c(a, b) + k(a) p(b)) / (c(a) + k(a)),  k(a) = distinct successors of a
        xz        8 (size(train + held_out) - size(train)) / n_held_out

    c counts the training bytes. The first held-out byte has no predecessor and costs its unigram.
    xz is raw LZMA2 at its highest preset with a dictionary of up to 32 MiB; of train it is given
    the last 16 MiB. Of more than 4 MiB of held-out bytes, so many are taken: `held_out_part`.

    Args:
        corpus: the split text, on any device.
        told: is called with every number of bytes compressed; they add up to `work`.

    Source: Krichevsky & Trofimov 1981 (the 1/2); Witten & Bell 1991, method C (k).
    """
    held_out = held_out_part(corpus)
    unigram, bigram = _byte_models(corpus.train.cpu())
    places = held_out.long()
    first = unigram[places[:1]].log2().sum()
    rest = bigram[places[:-1], places[1:]].log2().sum()
    both, alone = _xz_sizes(corpus.train[-XZ_WINDOW:].cpu(), held_out, told or (lambda n: None))
    return {
        "unigram": -unigram[places].log2().mean().item(),
        "bigram": -(first + rest).item() / len(places),
        "xz": 8 * (both - alone) / len(places),
    }


def duplicate_share(corpus: Halves, length: int = 64) -> float:
    """Share of the held-out bytes that lie in a stretch which also stands verbatim in train.

    Args:
        corpus: the split text; of its held-out bytes, the part of `held_out_part`.
        length: shortest stretch that counts, in bytes; rounded up to a power of two.

    Returns:
        0 (nothing is repeated) to 1 (every held-out byte could have been memorised).
    """
    length = 1 << (length - 1).bit_length()
    if min(len(corpus.train), len(corpus.valid)) < length:
        return 0.0
    sought = _fingerprints(held_out_part(corpus), length)
    ranked, place = np.unique(sought, return_inverse=True)
    repeated = np.zeros(len(ranked), dtype=bool)
    for start in range(0, len(corpus.train) - length + 1, CHUNK):
        chunk = corpus.train[start : start + CHUNK + length - 1].cpu()
        left = np.flatnonzero(~repeated)
        repeated[left[_occur(ranked[left], _fingerprints(chunk, length))]] = True
    covered = np.convolve(repeated[place], np.ones(length)) > 0.5
    return float(covered.mean())


def _occur(sought: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(n,) bool, which of n fingerprints, ascending, are among others. Their first bits say of most
    others that none is sought, so that few have to be sorted."""
    possible = np.zeros(1 << BITS, dtype=bool)
    possible[_first_bits(sought)] = True
    known = np.sort(known[possible[_first_bits(known)]])
    if not len(known):
        return np.zeros(len(sought), dtype=bool)
    return known[np.searchsorted(known, sought).clip(max=len(known) - 1)] == sought


def _first_bits(fingerprints: np.ndarray) -> np.ndarray:
    return (fingerprints >> np.uint64(64 - BITS)).astype(np.int64)


def _byte_models(train: Tensor) -> tuple[Tensor, Tensor]:
    """p(b) (256,) and p(b | a) (256, 256) float64 as in `baselines`."""
    unigram = (torch.bincount(train, minlength=256).double() + 0.5) / (len(train) + 128)
    pairs = torch.zeros(256 * 256, dtype=torch.float64)
    for start in range(0, len(train) - 1, CHUNK):
        chunk = train[start : start + CHUNK + 1]
        pair_ids = chunk[:-1].int() * 256 + chunk[1:]
        pairs += torch.bincount(pair_ids, minlength=256 * 256)
    pairs = pairs.view(256, 256)
    successors = (pairs > 0).sum(1, keepdim=True).clamp(min=1)
    return unigram, (pairs + successors * unigram) / (pairs.sum(1, keepdim=True) + successors)


def _xz_sizes(context: Tensor, held_out: Tensor, told: Callable[[int], object]) -> tuple[int, int]:
    """Bytes of context and held-out text together, and of the context alone, when compressed."""
    compressors = [_compressor(len(context) + len(held_out)), _compressor(len(context))]
    sizes = [0, 0]

    def feed(which: int, piece: bytes) -> None:
        sizes[which] += len(compressors[which].compress(piece))

    def end(which: int) -> None:
        sizes[which] += len(compressors[which].flush())

    with ThreadPoolExecutor(2) as pool:
        for piece in context.split(PIECE):
            text = piece.numpy().tobytes()
            list(pool.map(feed, (0, 1), (text, text)))
            told(2 * len(text))
        last = pool.submit(end, 1)
        for piece in held_out.split(PIECE):
            feed(0, piece.numpy().tobytes())
            told(len(piece))
        end(0)
        last.result()
    return sizes[0], sizes[1]


def _compressor(n: int) -> lzma.LZMACompressor:
    dictionary_bytes = min(max(n, 4096), 2 * XZ_WINDOW)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": dictionary_bytes}]
    return lzma.LZMACompressor(lzma.FORMAT_RAW, filters=filters)


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
