"""Rotary positions as layers use them: how they are stretched, and one table for all layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kizzasi.models.call import Call
from kizzasi.models.ops.rope import (
    llama3_frequencies,
    ntk_theta,
    rope_frequencies,
    rope_tables,
    xpos_scales,
    yarn_attention_factor,
    yarn_frequencies,
)
from kizzasi.strict import Strict, added, join, require

READ_BY = {
    "original_context": ("yarn", "llama3", "longrope"),
    "attention_factor": ("yarn", "longrope"),
    "divisors": ("longrope",),
}


@dataclass(frozen=True)
class RopeScaling(Strict):
    """How rotary positions are stretched beyond the context that a model was trained on.

    Args:
        method: "linear" divides every frequency by factor (Chen et al. 2023, arXiv:2306.15595),
            "ntk" raises the base, "yarn" and "llama3" divide the slow frequencies only (Peng et al.
            2023, arXiv:2309.00071; Dubey et al. 2024, arXiv:2407.21783), "longrope" divides each
            by its own number (Ding et al. 2024, arXiv:2402.13753).
        factor: context after extension / context of training.
        original_context: tokens that the model was trained on (yarn, llama3, longrope).
        beta_fast, beta_slow: turns within original_context at which yarn's blend begins and ends.
        attention_factor: scale of rotated queries and keys (yarn, longrope); None: the paper's.
        low_freq_factor, high_freq_factor: the same turns for llama3: at most the first, a frequency
            is divided by factor; from the second on, it is kept.
        divisors: of every frequency, n_rotated / 2 numbers (longrope). The published code changes
            from one list to another with the length of the input; here a model has one.
        truncate: whether the ends of yarn's blend are rounded to whole pairs (gpt-oss: not).
    """

    method: Literal["linear", "ntk", "yarn", "llama3", "longrope"]
    factor: float
    original_context: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    divisors: tuple[float, ...] = ()
    truncate: bool = added(True)

    def check(self, n_rotated: int, path: str) -> None:
        """Raise SpecError for a rule that the fields break with n_rotated entries per head."""
        require(self.factor >= 1, join(path, "factor"), f"{self.factor} is below 1; give 1 or more")
        if self.method == "ntk":
            require(n_rotated > 2, path, "ntk cannot stretch 2 rotated entries; use linear")
        rule = f"{self.method} does not read it; leave it out"
        require(self.truncate or self.method == "yarn", join(path, "truncate"), rule)
        for name, readers in READ_BY.items():
            ok = self.method in readers or not getattr(self, name)
            require(ok, join(path, name), f"{self.method} does not read it; leave it out")
        if self.method in READ_BY["original_context"]:
            known = self.original_context is not None and self.original_context > 1
            rule = f"{self.method} needs it; give the tokens of training, at least 2"
            require(known, join(path, "original_context"), rule)
        if self.method == "yarn":
            rising = 0 < self.beta_slow < self.beta_fast
            require(rising, join(path, "beta_slow"), "outside (0, beta_fast); 1 is usual")
        if self.method == "llama3":
            rising = 0 < self.low_freq_factor < self.high_freq_factor
            rule = "outside (0, high_freq_factor); 1 is usual"
            require(rising, join(path, "low_freq_factor"), rule)
        if self.method == "longrope":
            ok = len(self.divisors) == n_rotated // 2 and min(self.divisors) > 0
            rule = f"give {n_rotated // 2} positive numbers, one per pair of rotated entries"
            require(ok, join(path, "divisors"), rule)
        positive = self.attention_factor is None or self.attention_factor > 0
        require(positive, join(path, "attention_factor"), "not positive; leave it out")

    def frequencies(
        self, n_rotated: int, theta: float, *, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """`rope_frequencies`, stretched."""
        if self.method == "ntk":
            theta = ntk_theta(theta, self.factor, n_rotated)
        plain = rope_frequencies(n_rotated, theta, device=device, dtype=dtype)
        if self.method == "ntk":
            return plain
        if self.method == "linear":
            return plain / self.factor
        if self.method == "longrope":
            return plain / torch.tensor(self.divisors, device=device, dtype=dtype)
        context = self.original_context
        assert context is not None, "checked"
        if self.method == "llama3":
            turns = self.low_freq_factor, self.high_freq_factor
            return llama3_frequencies(plain, self.factor, context, *turns)
        turns = self.beta_fast, self.beta_slow, self.truncate
        return yarn_frequencies(plain, theta, self.factor, context, *turns)

    @property
    def scale(self) -> float:
        """Factor of the rotated queries and keys."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.method == "longrope":
            assert self.original_context is not None, "checked"
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_context))
        return yarn_attention_factor(self.factor) if self.method == "yarn" else 1.0


UNSCALED = RopeScaling("linear", 1.0)


class Rotary:
    """The tables of `rotate`. Layers of one call that rotate alike share one."""

    def __init__(self, n_rotated: int, theta: float, scaling: RopeScaling | None) -> None:
        self.n_rotated, self.theta, self.scaling = n_rotated, theta, scaling or UNSCALED
        self.name = f"rope of {n_rotated}, {theta}, {scaling}"

    def tables(
        self, call: Call, counted: str, position: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Cosine and sine (b, 1, t, n_rotated) of the call's positions (b or 1, t).

        counted: names how they were counted; what has one name in a call is computed once.
        """

        def make() -> tuple[Tensor, ...]:
            frequencies = self.scaling.frequencies(
                self.n_rotated, self.theta, device=position.device, dtype=dtype
            )
            return rope_tables(position, frequencies, self.scaling.scale).unbind()

        cos, sin = call.once(f"{self.name}, {dtype}, {counted}", make)
        return cos, sin

    def fading_tables(
        self, call: Call, counted: str, position: Tensor, dtype: torch.dtype, base: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`tables` of queries, then those of keys, for xPos with this base."""

        def make() -> tuple[Tensor, Tensor, Tensor, Tensor]:
            cos, sin = self.tables(call, counted, position, dtype)
            scale = xpos_scales(position, self.n_rotated, base, dtype)
            return cos * scale, sin * scale, cos / scale, sin / scale

        return call.once(f"{self.name}, fading by {base}, {dtype}, {counted}", make)
