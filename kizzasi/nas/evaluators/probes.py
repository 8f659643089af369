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

import math
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from kizzasi.models import ModelSpec, SequenceModel, Tokens, build_model
from kizzasi.train.bytes import ByteCorpus
from kizzasi.train.leak import find_leak
from kizzasi.train.recipe import Recipe
from kizzasi.train.seeds import derive_seed
from kizzasi.train.synthetic import MQAR, Parity, SelectiveCopying, Task
from kizzasi.train.trainer import CHECK_EVERY, Training

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

    task: Task
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
        chance = self.task.chance
        model = build_model(self.spec_for(spec), seed=seed, device=device)
        if leak := find_leak(model, self.seq_len):
            return ProbeResult(None, chance, 0, 0.0, leak)
        training = self._training(model, seed)
        start = time.perf_counter()
        failure = self._train(training, seed)
        seconds = time.perf_counter() - start
        accuracy = None if failure else self._accuracy(model, seed)
        return ProbeResult(accuracy, chance, training.step, seconds, failure)

    @property
    def seq_len(self) -> int:
        return self.task.sample(1, 0).inputs.shape[1]

    def spec_for(self, spec: ModelSpec) -> ModelSpec:
        """The spec with the task's vocabulary and, if it has positions, enough of them."""
        stem = Tokens(self.task.vocab_size)
        if isinstance(spec.stem, Tokens) and spec.stem.max_positions is not None:
            stem = replace(stem, max_positions=max(self.seq_len, spec.stem.max_positions))
        return spec.replace(stem=stem)

    def _training(self, model: SequenceModel, seed: int) -> Training:
        """The optimiser and schedule of micro-training; the batches come from the task instead."""
        horizon = self.steps * self.batch_size * self.seq_len
        recipe = Recipe(horizon, self.seq_len, self.batch_size, self.lr)
        ids = self.task.sample(1, derive_seed(seed, "probe", 0)).inputs[0].to(torch.uint8)
        corpus = ByteCorpus(type(self.task).__name__, ids, ids, "", len(ids))
        return Training(model, corpus, recipe, data_seed=derive_seed(seed, "probe"))

    def _train(self, training: Training, seed: int) -> str | None:
        training.model.train()
        while training.step < self.steps:
            batch = self.task.sample(self.batch_size, derive_seed(seed, "probe", training.step))
            loss = training._step(*(x.to(training.device) for x in batch[:2]))
            if training.step % CHECK_EVERY == 0 and not math.isfinite(loss.item()):
                return f"the loss became {loss.item()} before step {training.step}; lower the lr"
        return None

    @torch.no_grad()
    def _accuracy(self, model: SequenceModel, seed: int) -> float:
        inputs, targets, mask = self.task.sample(N_HELD_OUT, derive_seed(seed, "held out"))
        model.eval()
        device = next(model.parameters()).device
        answers = torch.cat(
            [model(x.to(device)).logits.argmax(-1).cpu() for x in inputs.split(self.batch_size)]
        )
        return (answers == targets)[mask].double().mean().item()


PROBES: dict[str, Probe] = {
    "recall": Probe(MQAR(vocab_size=16, seq_len=20, n_kv_pairs=3, power_a=1.0)),
    "copy": Probe(SelectiveCopying(vocab_size=8, seq_len=20, n_tokens=4)),
    "parity": Probe(Parity(seq_len=24)),
}
