"""Recall: answer from what was read before, or from what was learnt.

Glossary
    induction_heads     recall what followed the trigger token when it stood there before
    mqar                multi-query associative recall: look up many keys, late and in any order
    in_context_recall   keys and values in turn; a key that came before is asked at once
    memorization        keys and values that are the same in every example: learnt by heart
    chance              accuracy of an even guess among the possible answers
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kizzasi.errors import SpecError
from kizzasi.train.synthetic.examples import TaskBatch, asked_at, check, distinct, seeded
from kizzasi.train.task import IGNORE


@dataclass(frozen=True)
class InductionHeads:
    """Random tokens; the trigger stands once inside and once at the end: what followed it?

        inputs   c a | d b b a c |      | trigger (id vocab_size - 1)
        targets                  d      scored at the last position only

    A model trained at one length is tested at others: build the task again with another seq_len.

    Args:
        vocab_size: the trigger and vocab_size - 1 ordinary tokens.
        seq_len: total length, at least 3.

    Source: Olsson et al. 2022, arXiv:2209.11895; as set in Gu & Dao 2023, arXiv:2312.00752,
        section 4.1.2 (vocab 16, trained at 256, tested from 2^6 to 2^20).
    """

    vocab_size: int = 16
    seq_len: int = 256

    def __post_init__(self) -> None:
        check(self, "vocab_size", self.vocab_size, 3, "the trigger and two ordinary tokens")
        check(self, "seq_len", self.seq_len, 3, "trigger, answer, trigger")

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 1)

    def sample(self, batch_size: int, seed: int) -> TaskBatch:
        """Draw fresh examples; equal arguments give equal examples."""
        generator = seeded(batch_size, seed)
        shape = (batch_size, self.seq_len)
        inputs = torch.randint(self.vocab_size - 1, shape, generator=generator)
        first = torch.randint(self.seq_len - 2, (batch_size, 1), generator=generator)
        inputs.scatter_(1, first, self.vocab_size - 1)
        inputs[:, -1] = self.vocab_size - 1
        targets = torch.full_like(inputs, IGNORE)
        targets[:, -1:] = inputs.gather(1, first + 1)
        return TaskBatch(inputs, targets, targets != IGNORE)


@dataclass(frozen=True)
class MQAR:
    """Key-value pairs, then each key once more, at places of its own: which value belongs to it?

        inputs   k1 v1 k2 v2 k3 v3 . . k2 . k1 . . . k3 .
        targets                        v2   v1       v3     scored at the queries only

    Queries stand at every second place after the pairs; the place number i = 1, 2, ... is drawn
    without replacement with weight power_a * i^(power_a - 1), so a small power_a crowds them close
    to the pairs. Keys are distinct ids of the lower half but 0, values distinct ids of the upper.

    Args:
        vocab_size: even; half of it keys, half of it values.
        seq_len: even; at least 4 n_kv_pairs.
        n_kv_pairs: pairs to remember; at most vocab_size / 2 - 1.
        power_a: exponent of the law of query places, in (0, 1]; 1 spreads them evenly.
        random_non_queries: fill what is between the queries with random ids instead of 0.

    Source: Arora et al. 2023 (Zoology), arXiv:2312.04927, section 4 and its published set-up;
        the defaults are its small example (vocab 256, length 64, 4 pairs).
    Differs: chance counts all values; a model that remembers which values occurred, but not to
        which keys they belong, reaches 1 / n_kv_pairs.
    """

    vocab_size: int = 256
    seq_len: int = 64
    n_kv_pairs: int = 4
    power_a: float = 0.01
    random_non_queries: bool = False

    def __post_init__(self) -> None:
        check(self, "n_kv_pairs", self.n_kv_pairs, 1, "something to look up")
        check(self, "seq_len", self.seq_len, 4 * self.n_kv_pairs, "each pair and a place to ask")
        check(self, "vocab_size", self.vocab_size, 2 * self.n_kv_pairs + 2, "distinct keys and 0")
        if self.seq_len % 2 or self.vocab_size % 2:
            raise SpecError(
                f"MQAR: seq_len={self.seq_len} and vocab_size={self.vocab_size} must be even"
            )
        if not 0 < self.power_a <= 1:
            raise SpecError(f"MQAR: power_a={self.power_a} must lie in (0, 1]; 0.01 is usual")

    @property
    def chance(self) -> float:
        return 2 / self.vocab_size

    def sample(self, batch_size: int, seed: int) -> TaskBatch:
        """Draw fresh examples; equal arguments give equal examples."""
        generator = seeded(batch_size, seed)
        n_pairs, half, n_context = self.n_kv_pairs, self.vocab_size // 2, 2 * self.n_kv_pairs
        keys = 1 + distinct(batch_size, half - 1, n_pairs, generator)
        values = half + distinct(batch_size, half, n_pairs, generator)
        place_number = 1.0 + torch.arange((self.seq_len - n_context) // 2, dtype=torch.float64)
        weights = self.power_a * place_number ** (self.power_a - 1)
        queries = n_context + 2 * distinct(
            batch_size, len(place_number), n_pairs, generator, weights
        )

        shape = (batch_size, self.seq_len)
        if self.random_non_queries:
            inputs = torch.randint(self.vocab_size, shape, generator=generator)
        else:
            inputs = torch.zeros(shape, dtype=torch.long)
        inputs[:, 0:n_context:2] = keys
        inputs[:, 1:n_context:2] = values
        inputs.scatter_(1, queries, keys)
        targets = torch.full_like(inputs, IGNORE).scatter(1, queries, values)
        return TaskBatch(inputs, targets, targets != IGNORE)


@dataclass(frozen=True)
class InContextRecall:
    """Keys and values in turn, with values that belong to keys within an example.

        inputs   k2 v7 k1 v3 . k2 v7 k1 v3      . noise
        targets               v7    v3          scored at keys that came before

    Args:
        n_keys: different tokens of keys, and as many of values.
        seq_len: total length; what a last whole pair does not fill is left out.
        noise: share of the positions that hold noise; 0 for plain recall. Pairs stay together.
        n_noise: different noise tokens.
        motif: keys and values are runs of this many tokens (fuzzy recall); 1 for plain recall.
            Scored at the last token of a key for the first of its value, and on inside the value.

    Source: Poli et al. 2024 (MAD), arXiv:2403.17844, section 3.
    Differs: runs are all of one length, where MAD draws lengths up to 3; noise stands in runs as
        long as a pair.
    """

    n_keys: int = 8
    seq_len: int = 128
    noise: float = 0.0
    n_noise: int = 16
    motif: int = 1

    def __post_init__(self) -> None:
        check(self, "n_keys", self.n_keys, 2, "two keys and two values")
        check(self, "motif", self.motif, 1, "a token")
        check(self, "seq_len", self.seq_len, 4 * self.motif, "a pair and its repetition")
        check(self, "n_noise", self.n_noise, 1, "a noise token")
        if not 0 <= self.noise < 1:
            raise SpecError(f"InContextRecall: noise={self.noise} must lie in [0, 1)")

    @property
    def vocab_size(self) -> int:
        return 2 * self.n_keys + (self.n_noise if self.noise else 0)

    @property
    def chance(self) -> float:
        return 1 / self.n_keys

    def sample(self, batch_size: int, seed: int) -> TaskBatch:
        """Draw fresh examples; equal arguments give equal examples."""
        generator, m = seeded(batch_size, seed), self.motif
        kinds, n = self.n_keys, self.seq_len // (2 * m)
        keys = torch.randint(kinds, (batch_size, kinds, m), generator=generator)
        keys[..., 0] = torch.arange(kinds)  # the first token tells them apart
        values = torch.randint(kinds, (batch_size, kinds, m), generator=generator) + kinds
        drawn = torch.randint(kinds, (batch_size, n), generator=generator)
        pairs = torch.cat([keys, values], -1)
        clean = pairs.gather(1, drawn[..., None].expand(-1, -1, 2 * m)).flatten(1)
        before = (drawn[:, :, None] == drawn[:, None]).tril(-1).any(-1)
        spots = torch.zeros(2 * m, dtype=torch.bool)
        spots[m - 1 : -1] = True
        asked = (before[..., None] & spots).flatten(1)
        answers = clean.roll(-1, 1)
        if self.noise == 0:
            return asked_at(clean, answers, asked)
        return self._with_noise(clean, answers, asked, generator)

    def _with_noise(
        self, clean: Tensor, answers: Tensor, asked: Tensor, generator: torch.Generator
    ) -> TaskBatch:
        """Noise between pairs; as many pairs fall off the end."""
        m, batch = self.motif, len(clean)
        n = clean.shape[1] // (2 * m)
        noisy = torch.rand(batch, n, generator=generator) < self.noise
        source = ((~noisy).cumsum(1) - 1).clamp(min=0)[..., None].expand(-1, -1, 2 * m)
        rows = [part.view(batch, n, -1).gather(1, source).flatten(1) for part in (clean, answers)]
        known = asked.view(batch, n, -1).gather(1, source).flatten(1)
        spread = noisy[..., None].expand(-1, -1, 2 * m).flatten(1)
        tokens = torch.randint(self.n_noise, spread.shape, generator=generator)
        inputs = torch.where(spread, tokens + 2 * self.n_keys, rows[0])
        return asked_at(inputs, rows[1], known & ~spread)


@dataclass(frozen=True)
class Memorization:
    """Keys, each before a blank at which its value is asked; the values never stand in the inputs.

        inputs   k3 . k1 . k7 .      . blank, the last id
        targets     v3   v1   v7

    Args:
        n_keys: keys, and as many values.
        seq_len: even.
        dictionary: seed of what belongs to what, the same in all examples.

    Source: Poli et al. 2024 (MAD), arXiv:2403.17844, section 3.
    """

    n_keys: int = 128
    seq_len: int = 32
    dictionary: int = 0

    def __post_init__(self) -> None:
        check(self, "n_keys", self.n_keys, 2, "something to tell apart")
        check(self, "seq_len", self.seq_len, 2, "a key and a blank")
        if self.seq_len % 2:
            raise SpecError(f"Memorization: seq_len={self.seq_len} must be even")

    @property
    def vocab_size(self) -> int:
        return 2 * self.n_keys + 1

    @property
    def chance(self) -> float:
        return 1 / self.n_keys

    def sample(self, batch_size: int, seed: int) -> TaskBatch:
        """Draw fresh examples; equal arguments give equal examples."""
        values = self.n_keys + torch.randperm(self.n_keys, generator=seeded(1, self.dictionary))
        shape = (batch_size, self.seq_len // 2)
        keys = torch.randint(self.n_keys, shape, generator=seeded(batch_size, seed))
        inputs = torch.full((batch_size, self.seq_len), 2 * self.n_keys)
        inputs[:, ::2] = keys
        answers = torch.full_like(inputs, IGNORE)
        answers[:, 1::2] = values[keys]
        return asked_at(inputs, answers, answers != IGNORE)
