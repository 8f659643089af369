"""TPE: a tree-structured Parzen estimator over genes, by optuna (the extra `optuna`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from kizzasi.errors import SpecError
from kizzasi.nas.searchers.ask_tell import Proposals, require_at_least
from kizzasi.nas.spaces.space import Space

C = TypeVar("C")
MISFITS = 300  # invalid suggestions in a row before the search ends


@dataclass(frozen=True)
class TPE:
    """Model which genes good candidates have, and propose what the model likes, one at a time.

    Every gene is a categorical variable of its own; conditional genes are asked for when they
    exist. Suggestions that do not fit together are told to the sampler as failed and not proposed.

    Args:
        n_evaluations: candidates proposed in all, at least 1; repeats are possible.
        n_startup: random ones at the start, at least 1.
        seed: 0 .. 2^64 - 1; its last 32 bits count.

    Source: Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization", NeurIPS 24,
        section 4; optuna's implementation.
    """

    n_evaluations: int
    n_startup: int
    seed: int

    def proposals(self, space: Space[C]) -> Proposals[C]:
        """Yield one candidate at a time; SpecError if optuna is not installed."""
        require_at_least(1, n_evaluations=self.n_evaluations, n_startup=self.n_startup)
        try:
            import optuna
        except ImportError as error:
            raise SpecError(
                "TPE: optuna is missing; pip install 'kizzasi-models[optuna]', or use another "
                "searcher"
            ) from error
        sampler = optuna.samplers.TPESampler(
            seed=self.seed % 2**32, n_startup_trials=self.n_startup
        )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        failed = optuna.trial.TrialState.FAIL
        proposed = misfits = 0
        while proposed < self.n_evaluations:
            trial = study.ask()

            def decide(gene: str, n: int, trial: optuna.Trial = trial) -> int:
                return trial.suggest_categorical(gene, range(n))

            try:
                candidate = space.build(decide)
            except SpecError:
                study.tell(trial, state=failed)
                misfits += 1
                if misfits == MISFITS and not proposed:
                    raise
                if misfits == MISFITS:
                    return
                continue
            (score,) = yield [candidate]
            study.tell(trial, score)
            proposed, misfits = proposed + 1, 0
