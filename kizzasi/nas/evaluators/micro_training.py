"""Micro-training: a short, honest training run that scores an architecture on held-out bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kizzasi.models import ModelSpec, build_model
from kizzasi.train import ByteCorpus, Recipe, Training, derive_seed, find_leak


@dataclass(frozen=True)
class Measurement:
    """What a micro-training found.

    Args:
        bits_per_byte: on the held-out bytes; None if the trial failed.
        tokens: trained on in total, earlier rungs included.
        seconds: of training in this call, scoring left out.
        tokens_per_second: of training in this call; None if it only scored.
        curve: see the glossary.
        failure: why the trial stopped, None if it did not.
    """

    bits_per_byte: float | None
    tokens: int
    seconds: float
    tokens_per_second: float | None
    curve: tuple[tuple[int, float], ...]
    failure: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class MicroTrain:
    """The evaluator: train a spec for a while, return its held-out score.

    Args:
        corpus: what to learn from.
        recipe: how.
        device: where.
    """

    corpus: ByteCorpus
    recipe: Recipe
    device: str = "cpu"

    def __call__(
        self,
        spec: ModelSpec,
        tokens: int,
        seed: int,
        *,
        checkpoint: Path | None = None,
        on_step: Callable[[int], object] | None = None,
    ) -> Measurement:
        """Train up to a budget and score.

        A new model first passes the no-leak gate. If the checkpoint file is there, training goes
        on from it; when the budget is reached, it is written anew.

        Args:
            spec: the architecture.
            tokens: the budget, earlier rungs included.
            seed: of the initialisation, and of the windows drawn: equal for all specs.
            checkpoint: where the training is kept between rungs; None keeps nothing.
            on_step: see `Training.run`.
        """
        training = self.training(spec, seed)
        if checkpoint is not None and checkpoint.exists():
            training.restore(checkpoint)
        elif leak := find_leak(training.model):
            return Measurement(None, 0, 0.0, None, (), leak)
        before, start = training.tokens, time.perf_counter()
        failure = training.run(tokens, on_step)
        seconds = time.perf_counter() - start
        if checkpoint is not None and failure is None:
            training.save(checkpoint)
        trained = training.tokens - before
        return Measurement(
            bits_per_byte=None if failure else training.score(),
            tokens=training.tokens,
            seconds=seconds,
            tokens_per_second=trained / seconds if trained else None,
            curve=tuple(training.curve),
            failure=failure,
        )

    def training(self, spec: ModelSpec, seed: int) -> Training:
        """A fresh training of the spec, for callers that want the model."""
        model = build_model(spec, seed=seed, device=self.device)
        return Training(model, self.corpus, self.recipe, derive_seed(seed, "data"))
