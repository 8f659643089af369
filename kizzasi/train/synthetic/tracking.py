"""State tracking: keep a count, a sum, or a permutation up to date as tokens come.

Glossary
    parity              count modulo 2: the smallest state-tracking problem
    modular_arithmetic  the value so far of a sum with products, modulo a small number
    group_products      the product so far of elements of a finite group
    chance              accuracy of an even guess among the possible answers
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Literal

import torch
from torch import Tensor

from kizzasi.errors import SpecError
from kizzasi.train.synthetic.examples import TaskBatch, asked_at, check, seeded
from kizzasi.train.task import IGNORE


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
        check(self, "min_len", self.min_len, 1, "a bit to count")
        check(self, "seq_len", self.seq_len, self.min_len, "min_len bits")

    @property
    def vocab_size(self) -> int:
        return 2

    @property
    def chance(self) -> float:
        return 0.5

    def sample(self, batch_size: int, seed: int) -> TaskBatch:
        """Draw fresh examples; equal arguments give equal examples."""
        generator = seeded(batch_size, seed)
        inputs = torch.randint(2, (batch_size, self.seq_len), generator=generator)
        targets = inputs.cumsum(1) % 2
        targets[:, : self.min_len - 1] = IGNORE
        return TaskBatch(inputs, targets, targets != IGNORE)


@dataclass(frozen=True)
class ModularArithmetic:
    """Digits with +, - or * between them: the value so far, from left to right, modulo a number.

        inputs   2 + 4 * 3 - 1      ids: digits 0 to modulus - 1, then +, -, *
        targets  2   1   3   2      modulo 5; scored at the digits from the second on

    Args:
        seq_len: odd, at least 3.
        modulus: at least 2.

    Source: Deletang et al. 2022, arXiv:2207.02098, as in Grazzi et al. 2024, arXiv:2411.12537.
    Differs: evaluated from left to right, no operation binds more strongly; every prefix is scored.
    """

    seq_len: int = 41
    modulus: int = 5

    def __post_init__(self) -> None:
        check(self, "modulus", self.modulus, 2, "more than one value")
        check(self, "seq_len", self.seq_len, 3, "two digits and an operation")
        if self.seq_len % 2 == 0:
            raise SpecError(f"ModularArithmetic: seq_len={self.seq_len} must be odd")

    @property
    def vocab_size(self) -> int:
        return self.modulus + 3

    @property
    def chance(self) -> float:
        return 1 / self.modulus

    def sample(self, batch_size: int, seed: int) -> TaskBatch:
        """Draw fresh examples; equal arguments give equal examples."""
        generator = seeded(batch_size, seed)
        n = self.seq_len // 2
        digits = torch.randint(self.modulus, (batch_size, n + 1), generator=generator)
        signs = torch.randint(3, (batch_size, n), generator=generator)
        inputs = torch.empty(batch_size, self.seq_len, dtype=torch.long)
        inputs[:, ::2], inputs[:, 1::2] = digits, self.modulus + signs
        answers, value = torch.full_like(inputs, IGNORE), digits[:, 0]
        for i in range(n):
            digit, sign = digits[:, i + 1], signs[:, i]
            results = torch.stack([value + digit, value - digit, value * digit])
            value = results.gather(0, sign[None])[0] % self.modulus
            answers[:, 2 * i + 2] = value
        return asked_at(inputs, answers, answers != IGNORE)


@dataclass(frozen=True)
class GroupProducts:
    """Random elements of a group: at every position, the product of all of them so far.

        targets[t] = inputs[0] inputs[1] ... inputs[t]      scored from the second on

    With S5 and A5 the state is a permutation of five things; no fixed number of layers whose state
    matrices are diagonal can follow it for long, and attention cannot at all in bounded depth. Z60
    has as many elements as A5 and commutes.

    Args:
        group: "S3" (6 elements), "A4" (12), "A5" (60), "S5" (120) or "Z60".
        seq_len: at least 2.

    Source: Merrill et al. 2024, arXiv:2404.08819, section 5.
    """

    group: Literal["S3", "A4", "A5", "S5", "Z60"] = "A5"
    seq_len: int = 20

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise SpecError(f"GroupProducts: group={self.group!r} unknown; choose {list(GROUPS)}")
        check(self, "seq_len", self.seq_len, 2, "two elements")

    @property
    def vocab_size(self) -> int:
        return len(multiplication(self.group))

    @property
    def chance(self) -> float:
        return 1 / self.vocab_size

    def sample(self, batch_size: int, seed: int) -> TaskBatch:
        """Draw fresh examples; equal arguments give equal examples."""
        table = multiplication(self.group)
        shape = (batch_size, self.seq_len)
        inputs = torch.randint(len(table), shape, generator=seeded(batch_size, seed))
        products = [inputs[:, 0]]
        for element in inputs.unbind(1)[1:]:
            products.append(table[products[-1], element])
        asked = torch.ones_like(inputs, dtype=torch.bool)
        asked[:, 0] = False
        return asked_at(inputs, torch.stack(products, 1), asked)


GROUPS = {"S3": (3, False), "A4": (4, True), "A5": (5, True), "S5": (5, False), "Z60": None}


@cache
def multiplication(group: str) -> Tensor:
    """(n, n) ids of a b, first a then b, of a group of n elements; id 0 is the neutral one."""
    shape = GROUPS[group]
    if shape is None:
        ids = torch.arange(60)
        return (ids[:, None] + ids) % 60
    things, even_only = shape
    elements = [p for p in permutations(range(things)) if not (even_only and _odd(p))]
    number = {p: i for i, p in enumerate(elements)}
    return torch.tensor([[number[tuple(b[i] for i in a)] for b in elements] for a in elements])


def _odd(p: tuple[int, ...]) -> bool:
    """Whether a permutation has an odd number of inversions."""
    return sum(p[j] < p[i] for i in range(len(p)) for j in range(i + 1, len(p))) % 2 == 1
