"""Lines that hide a place: what latent bits of a document are good for, and whether they say it.

Glossary
    letter  that of the prompt, of which a run stands in the line
    place   where in the line the run begins
    noise   characters that are overwritten with "!", each by itself
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kizzasi.errors import SpecError
from kizzasi.train.synthetic.examples import TaskBatch, asked_at, check, seeded


@dataclass(frozen=True)
class HiddenPlace:
    """A letter, ">", and a line of blanks with a run of that letter at a random place, and noise.

        inputs   C > _ _ C C ! C _ _ !    ids: letters, then blank, noise, ">"
        targets    _ _ C C ! C _ _ ! _    scored from ">" on

    No prefix tells the rest: `bits` is what a line takes. A latent of the line that may cost a
    little says the place, one that may cost more the noise too.

    Args:
        n_letters: different letters.
        length: of the line.
        n_equal: letters of the run.
        noise: chance that a character is overwritten, below 1.

    Source: Fleuret 2025, arXiv:2510.17558, section 4.1 (64 characters, runs of 8, noise 1/16).
    """

    n_letters: int = 26
    length: int = 64
    n_equal: int = 8
    noise: float = 1 / 16

    def __post_init__(self) -> None:
        check(self, "n_letters", self.n_letters, 1, "a letter")
        check(self, "n_equal", self.n_equal, 1, "a run")
        check(self, "length", self.length, self.n_equal, "the run")
        if not 0 <= self.noise < 1:
            raise SpecError(f"HiddenPlace: noise={self.noise} must lie in [0, 1); 1/16 is usual")

    @property
    def vocab_size(self) -> int:
        return self.n_letters + 3

    @property
    def chance(self) -> float:
        return 1 / self.vocab_size

    @property
    def bits(self) -> float:
        """What a line takes with the letter known: of the place, and of the noise."""
        p = self.noise
        each = -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) if p else 0.0
        return math.log2(self.length - self.n_equal + 1) + self.length * each

    def sample(self, batch_size: int, seed: int) -> TaskBatch:
        """Draw fresh examples; equal arguments give equal examples."""
        generator = seeded(batch_size, seed)
        letter = torch.randint(self.n_letters, (batch_size, 1), generator=generator)
        last = self.length - self.n_equal
        place = torch.randint(last + 1, (batch_size, 1), generator=generator)
        index = torch.arange(self.length).expand(batch_size, -1)
        line = torch.where(self._in_run(index, place), letter, self.n_letters)
        over = torch.rand(batch_size, self.length, generator=generator) < self.noise
        line = line.masked_fill(over, self.n_letters + 1)
        text = torch.cat([letter, torch.full_like(letter, self.n_letters + 2), line], 1)
        asked = torch.ones_like(text[:, 1:], dtype=torch.bool)
        asked[:, 0] = False
        return asked_at(text[:, :-1], text[:, 1:], asked)

    def prompt(self, letters: Tensor) -> Tensor:
        """(n, 2) the prompts of letters (n,)."""
        return torch.stack([letters, torch.full_like(letters, self.n_letters + 2)], 1)

    def places(self, lines: Tensor, letters: Tensor) -> Tensor:
        """(n,) where the run of each letter (n,) most likely begins in each line (n, length)."""
        hits = (lines == letters[:, None]) + 0.01 * self.noise_of(lines)  # noise may hide an end
        return hits.unfold(1, self.n_equal, 1).sum(-1).argmax(1)

    def noise_of(self, lines: Tensor) -> Tensor:
        """(n, length) bool, where the noise of lines is."""
        return lines == self.n_letters + 1

    def sound(self, lines: Tensor, letters: Tensor) -> Tensor:
        """(n,) bool: whether a line is one that could be drawn."""
        index = torch.arange(self.length, device=lines.device).expand_as(lines)
        run = self._in_run(index, self.places(lines, letters)[:, None])
        due = torch.where(run, letters[:, None], self.n_letters)
        return ((lines == due) | self.noise_of(lines)).all(1)

    def _in_run(self, index: Tensor, place: Tensor) -> Tensor:
        return (index >= place) & (index < place + self.n_equal)
