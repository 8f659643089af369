"""Probes: what a mixer can learn of recall, copying and counting in a few seconds of training.

A probe replaces the vocabulary of a spec by that of a synthetic task, trains the model on fresh
examples and counts its right answers on others. It asks what bits per byte hide: recall decides few
bytes of a text (Arora et al. 2023, arXiv:2312.04927).

| probe | task | what it takes |
|---|---|---|
| recall | MQAR, 3 pairs among 20 tokens | look up a value by its key |
| copy | selective copying, 4 of 20 tokens | keep what counts among noise, give it back in order |
| parity | parity of every prefix of 24 bits | one bit of state that every token may turn |
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from kizzasi.models import ModelSpec, Tokens, build_model
from kizzasi.train.leak import find_leak
from kizzasi.train.recipe import Recipe
from kizzasi.train.seeds import derive_seed
from kizzasi.train.synthetic import MQAR, Examples, Parity, SelectiveCopying, SyntheticTask
from kizzasi.train.trainer import Training

N_HELD_OUT = 256  # examples that are scored


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    Args:
        accuracy: share of right answers on held-out examples; None if the probe failed.
        chance: what guessing reaches.
        steps: of training.
        seconds: of training.
        failure: why there is no accuracy, None if there is.
    """

    accuracy: float | None
    chance: float
    steps: int
    seconds: float
    failure: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Probe:
    """A synthetic task and a short training on it.

    Args:
        task: where the examples come from.
        steps: of training; the learning rate falls over them.
        batch_size: fresh examples per step.
        lr: peak learning rate.
    """

    task: Examples
    steps: int = 300
    batch_size: int = 16
    lr: float = 4e-3

    def __call__(self, spec: ModelSpec, seed: int = 0, device: str = "cpu") -> ProbeResult:
        """Train the spec on the task and count its right answers.

        A model that leaks the future fails without training. Training and held-out examples are
        drawn from seeds of their own, and equal arguments give equal results.

        Args:
            spec: any architecture; its stem is replaced by tokens of the task's vocabulary.
            seed: of the initialisation and of the examples.
            device: where to train.

        Raises:
            SpecError: the spec breaks a rule.
        """
        task = SyntheticTask(self.task, N_HELD_OUT)
        model = build_model(self.spec_for(spec), seed=seed, device=device)
        if leak := find_leak(model):
            return ProbeResult(None, self.task.chance, 0, 0.0, leak)
        horizon = self.steps * self.batch_size * task.seq_len
        recipe = Recipe(horizon, task.seq_len, self.batch_size, self.lr)
        training = Training(model, task, recipe, derive_seed(seed, "probe"))
        start = time.perf_counter()
        failure = training.run(horizon)
        seconds = time.perf_counter() - start
        accuracy = None if failure else training.score()
        return ProbeResult(accuracy, self.task.chance, training.step, seconds, failure)

    def spec_for(self, spec: ModelSpec) -> ModelSpec:
        """The spec with the task's vocabulary and, if it has positions, enough of them."""
        stem, seq_len = Tokens(self.task.vocab_size), SyntheticTask(self.task).seq_len
        if isinstance(spec.stem, Tokens) and spec.stem.max_positions is not None:
            stem = replace(stem, max_positions=max(seq_len, spec.stem.max_positions))
        return spec.replace(stem=stem)


PROBES: dict[str, Probe] = {
    "recall": Probe(MQAR(vocab_size=16, seq_len=20, n_kv_pairs=3, power_a=1.0)),
    "copy": Probe(SelectiveCopying(vocab_size=8, seq_len=20, n_tokens=4)),
    "parity": Probe(Parity(seq_len=24)),
}
