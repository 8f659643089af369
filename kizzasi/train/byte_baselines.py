"""What a byte model must beat, and how much of what it is scored on it could have memorised."""

from __future__ import annotations

import lzma
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

DUPLICATE_CHUNK = 16 << 20  # bounds the memory of duplicate_share
XZ_WINDOW = 32 << 20  # bounds the compressor's memory, 11 times as much


class Halves(Protocol):
    """A split text: what is learnt from, and what is scored."""

    @property
    def train(self) -> Tensor: ...

    @property
    def valid(self) -> Tensor: ...


def baselines(corpus: Halves) -> dict[str, float]:
    """What the held-out bytes cost without a neural network, in bits per byte.

        unigram   p(b) = (c(b) + 1/2) / (n + 128)
        bigram    p(b | a) = (c(a, b) + k(a) p(b)) / (c(a) + k(a)),  k(a) = distinct successors of a
        xz        8 (size(train + held_out) - size(train)) / n_held_out

    c counts the training bytes. The first held-out byte has no predecessor and costs its unigram.
    xz is raw LZMA2 at its highest preset with a dictionary of up to 64 MiB; of train it is given
    the last 32 MiB.

    Source: Krichevsky & Trofimov 1981 (the 1/2); Witten & Bell 1991, method C (k).
    """
    held_out = corpus.valid.long()
    unigram, bigram = _byte_models(corpus.train)
    first = unigram[held_out[:1]].log2().sum()
    rest = bigram[held_out[:-1], held_out[1:]].log2().sum()
    context = corpus.train[-XZ_WINDOW:]
    with ThreadPoolExecutor(2) as pool:
        both, alone = pool.map(_xz_size, (torch.cat([context, corpus.valid]), context))
    return {
        "unigram": -unigram[held_out].log2().mean().item(),
        "bigram": -(first + rest).item() / len(held_out),
        "xz": 8 * (both - alone) / len(held_out),
    }


def duplicate_share(corpus: Halves, length: int = 64) -> float:
    """Share of the held-out bytes that lie in a stretch which also stands verbatim in train.

    Args:
        corpus: the split text.
        length: shortest stretch that counts, in bytes; rounded up to a power of two.

    Returns:
        0 (nothing is repeated) to 1 (every held-out byte could have been memorised).
    """
    length = 1 << (length - 1).bit_length()
    if min(len(corpus.train), len(corpus.valid)) < length:
        return 0.0
    sought = _fingerprints(corpus.valid, length)
    repeated = np.zeros(len(sought), dtype=bool)
    for start in range(0, len(corpus.train) - length + 1, DUPLICATE_CHUNK):
        chunk = corpus.train[start : start + DUPLICATE_CHUNK + length - 1]
        known = np.sort(_fingerprints(chunk, length))
        repeated |= known[np.searchsorted(known, sought).clip(max=len(known) - 1)] == sought
    covered = np.convolve(repeated, np.ones(length)) > 0.5
    return float(covered.mean())


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
