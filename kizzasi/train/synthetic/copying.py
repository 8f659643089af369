"""Copying: write down again what was read, in order or backwards.

Glossary
    selective_copying   write down, in order, the data tokens that were scattered among noise
    reverse             write a number's digits backwards
    chance              accuracy of an even guess among the possible answers
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kizzasi.train.synthetic.examples import TaskBatch, asked_at, check, distinct, seeded
from kizzasi.train.task import IGNORE


@dataclass(frozen=True)
class SelectiveCopying:
    """Data tokens at random places among noise, then n_tokens markers: copy the k-th at the k-th.

        inputs   . . b . a . . d . | | | |      . noise (id 0), | marker (id vocab_size - 1)
        targets                    b a d ...    scored at the markers only

    Time-invariant convolutions cannot do it, since the gaps vary; it takes selection by content.

    Args:
        vocab_size: noise, marker and vocab_size - 2 data tokens.
        seq_len: total length, the answer included; at least 2 n_tokens.
        n_tokens: how many data tokens are to be memorised.

    Source: Gu & Dao 2023, arXiv:2312.00752, section 4.1.1 (length 4096, vocab 16, 16 tokens);
        the default length 256 is that of MAD, arXiv:2403.17844.
    """

    vocab_size: int = 16
    seq_len: int = 256
    n_tokens: int = 16

    def __post_init__(self) -> None:
        check(self, "vocab_size", self.vocab_size, 3, "noise, marker and one data token")
        check(self, "n_tokens", self.n_tokens, 1, "something to copy")
        check(self, "seq_len", self.seq_len, 2 * self.n_tokens, "n_tokens and their copy")

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 2)

    def sample(self, batch_size: int, seed: int) -> TaskBatch:
        """Draw fresh examples; equal arguments give equal examples."""
        generator = seeded(batch_size, seed)
        n_content = self.seq_len - self.n_tokens
        data = torch.randint(
            1, self.vocab_size - 1, (batch_size, self.n_tokens), generator=generator
        )
        places = distinct(batch_size, n_content, self.n_tokens, generator).sort(1).values
        inputs = torch.zeros(batch_size, self.seq_len, dtype=torch.long)
        inputs.scatter_(1, places, data)
        inputs[:, n_content:] = self.vocab_size - 1
        targets = torch.full_like(inputs, IGNORE)
        targets[:, n_content:] = data
        return TaskBatch(inputs, targets, targets != IGNORE)


@dataclass(frozen=True)
class Reverse:
    """A decimal number, a comma, its digits backwards, an end mark, and more end marks to fill up.

        inputs   4 0 7 , 7 0 4 # #      ids: digits 0 to 9, comma 10, end mark 11
        targets        7 0 4 #          scored from the comma on, up to the first end mark

    The number's length is drawn evenly from 1 to max_digits, then its digits; the first may be 0.

    Args:
        max_digits: examples are 2 max_digits + 2 long.

    Source: the reverse demonstration in RWKV-LM (12 characters, numbers of 1 to 60 digits).
    """

    max_digits: int = 20

    def __post_init__(self) -> None:
        check(self, "max_digits", self.max_digits, 1, "a digit")

    @property
    def vocab_size(self) -> int:
        return 12

    @property
    def chance(self) -> float:
        return 1 / 11  # a digit or the end

    def sample(self, batch_size: int, seed: int) -> TaskBatch:
        """Draw fresh examples; equal arguments give equal examples."""
        generator = seeded(batch_size, seed)
        most = self.max_digits
        n = torch.randint(1, most + 1, (batch_size, 1), generator=generator)
        digits = torch.randint(10, (batch_size, most), generator=generator)
        place = torch.arange(2 * most + 2).expand(batch_size, -1)
        forwards = digits.gather(1, place.clamp(max=most - 1))
        backwards = digits.gather(1, (2 * n - place).clamp(0, most - 1))
        inputs = torch.full_like(place, 11)
        inputs = torch.where((place > n) & (place <= 2 * n), backwards, inputs)
        inputs = torch.where(place == n, 10, inputs)
        inputs = torch.where(place < n, forwards, inputs)
        return asked_at(inputs, inputs.roll(-1, 1), (place >= n) & (place <= 2 * n))
