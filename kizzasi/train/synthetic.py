"""Synthetic tasks that ask a mixer one question each: can it select, recall, look up, keep count?

Every task is a seeded generator of `TaskBatch`. `loss_mask` marks the positions that are scored;
there the target follows from the inputs up to and including that position, and everywhere else the
target is IGNORE, which `cross_entropy` skips, so no unscored position can leak an answer.

Glossary
    selective_copying   write down, in order, the data tokens that were scattered among noise
    induction_heads     recall what followed the trigger token when it stood there before
    mqar                multi-query associative recall: look up many keys, late and in any order
    parity              count modulo 2: the smallest state-tracking problem
    chance              accuracy of an even guess among the possible answers
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kizzasi.errors import SpecError
from kizzasi.train.task import IGNORE


class TaskBatch(NamedTuple):
    """inputs (b, t) long, targets (b, t) long with IGNORE where loss_mask (b, t) bool is False."""

    inputs: Tensor
    targets: Tensor
    loss_mask: Tensor


class Examples(Protocol):
    """What every generator offers: its vocabulary, its guessing accuracy, and seeded examples."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def chance(self) -> float: ...

    def sample(self, batch_size: int, seed: int) -> TaskBatch:
        """Draw fresh examples; equal arguments give equal examples."""
        ...


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
        _check(self, "vocab_size", self.vocab_size, 3, "noise, marker and one data token")
        _check(self, "n_tokens", self.n_tokens, 1, "something to copy")
        _check(self, "seq_len", self.seq_len, 2 * self.n_tokens, "n_tokens and their copy")

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 2)

    def sample(self, batch_size: int, seed: int) -> TaskBatch:
        """Draw fresh examples; equal arguments give equal examples."""
        generator = _generator(batch_size, seed)
        n_content = self.seq_len - self.n_tokens
        data = torch.randint(
            1, self.vocab_size - 1, (batch_size, self.n_tokens), generator=generator
        )
        places = _distinct(batch_size, n_content, self.n_tokens, generator).sort(1).values
        inputs = torch.zeros(batch_size, self.seq_len, dtype=torch.long)
        inputs.scatter_(1, places, data)
        inputs[:, n_content:] = self.vocab_size - 1
        targets = torch.full_like(inputs, IGNORE)
        targets[:, n_content:] = data
        return TaskBatch(inputs, targets, targets != IGNORE)


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
        _check(self, "vocab_size", self.vocab_size, 3, "the trigger and two ordinary tokens")
        _check(self, "seq_len", self.seq_len, 3, "trigger, answer, trigger")

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 1)

    def sample(self, batch_size: int, seed: int) -> TaskBatch:
        """Draw fresh examples; equal arguments give equal examples."""
        generator = _generator(batch_size, seed)
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
        _check(self, "n_kv_pairs", self.n_kv_pairs, 1, "something to look up")
        _check(self, "seq_len", self.seq_len, 4 * self.n_kv_pairs, "each pair and a place to ask")
        _check(self, "vocab_size", self.vocab_size, 2 * self.n_kv_pairs + 2, "distinct keys and 0")
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
        generator = _generator(batch_size, seed)
        n_pairs, half, n_context = self.n_kv_pairs, self.vocab_size // 2, 2 * self.n_kv_pairs
        keys = 1 + _distinct(batch_size, half - 1, n_pairs, generator)
        values = half + _distinct(batch_size, half, n_pairs, generator)
        place_number = 1.0 + torch.arange((self.seq_len - n_context) // 2, dtype=torch.float64)
        weights = self.power_a * place_number ** (self.power_a - 1)
        queries = n_context + 2 * _distinct(
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
class Parity:
    """Random bits; at every position from min_len on: is the number of ones so far odd?

        targets[t] = (inputs[0] + ... + inputs[t]) mod 2        scored where t + 1 >= min_len

    No linear recurrence whose eigenvalues are all positive can do it at every length, however
    long it is trained; with a negative eigenvalue one layer is enough.

    Args:
        seq_len: total length.
        min_len: shortest prefix that is scored, 1 to seq_len.

    Source: Grazzi et al. 2024, arXiv:2411.12537; lengths as in Mamba-3, arXiv:2603.15569
        (trained from 3 to 40 and up to 160, tested at 256).
    Differs: they draw a length and score the end; scoring every prefix of a causal model asks for
        all lengths in one row.
    """

    seq_len: int = 40
    min_len: int = 3

    def __post_init__(self) -> None:
        _check(self, "min_len", self.min_len, 1, "a bit to count")
        _check(self, "seq_len", self.seq_len, self.min_len, "min_len bits")

    @property
    def vocab_size(self) -> int:
        return 2

    @property
    def chance(self) -> float:
        return 0.5

    def sample(self, batch_size: int, seed: int) -> TaskBatch:
        """Draw fresh examples; equal arguments give equal examples."""
        generator = _generator(batch_size, seed)
        inputs = torch.randint(2, (batch_size, self.seq_len), generator=generator)
        targets = inputs.cumsum(1) % 2
        targets[:, : self.min_len - 1] = IGNORE
        return TaskBatch(inputs, targets, targets != IGNORE)


TASKS: dict[str, type[SelectiveCopying | InductionHeads | MQAR | Parity]] = {
    "selective_copying": SelectiveCopying,
    "induction_heads": InductionHeads,
    "mqar": MQAR,
    "parity": Parity,
}


def _check(task: Examples, name: str, value: int, least: int, reason: str) -> None:
    if value < least:
        raise SpecError(
            f"{type(task).__name__}: {name}={value} must be at least {least}, to hold {reason}"
        )


def _generator(batch_size: int, seed: int) -> torch.Generator:
    if batch_size < 1:
        raise SpecError(f"batch_size={batch_size} must be at least 1")
    return torch.Generator().manual_seed(seed)


def _distinct(
    batch_size: int,
    n_choices: int,
    n_drawn: int,
    generator: torch.Generator,
    weights: Tensor | None = None,
) -> Tensor:
    """(b, n_drawn) distinct indices below n_choices, drawn one by one with these weights.

    The first arrivals of independent exponential clocks with those rates have exactly that law.
    """
    arrivals = torch.empty(batch_size, n_choices, dtype=torch.float64)
    arrivals.exponential_(generator=generator)
    if weights is not None:
        arrivals /= weights
    return arrivals.topk(n_drawn, largest=False).indices
