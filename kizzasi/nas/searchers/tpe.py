"""TPE: a tree-structured Parzen estimator over genes, by optuna (the extra `optuna`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from kizzasi.errors import SpecError
from kizzasi.nas.searchers.ask_tell import Proposals, require_at_least
from kizzasi.nas.searchers.stream import Stream
from kizzasi.nas.spaces.space import Space

C = TypeVar("C")
VIOLATION = "violation"  # above 0 for what the space refuses
MISFITS = 300  # invalid suggestions in a row before the search ends


@dataclass(frozen=True)
class TPE:
    """Model which genes good candidates have, and propose what the model likes, one at a time.

    Every gene is a categorical variable of its own; conditional genes are asked for when they
    exist. Suggestions that do not fit together are told to the sampler as complete and infeasible,
    so that it learns the borders of the space, and are not proposed. Its settings are written down
    here, since optuna's defaults change with its version; which one it was is in the journal.

    Args:
        n_evaluations: candidates proposed in all, at least 1; repeats are possible.
        n_startup: random ones at the start, at least 1.
        seed: 0 .. 2^64 - 1; its last 32 bits count.

    Source: Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization", NeurIPS 24,
        section 4; optuna's implementation.
    Differs: a result cannot be changed in optuna, so a candidate that was trained further is added
        once more, with its new score.
    """

    n_evaluations: int
    n_startup: int
    seed: int

    def proposals(self, space: Space[C]) -> Proposals[C]:
        """Yield one candidate at a time; SpecError if optuna is not installed."""
        stream = self.stream(space)
        news: list[tuple[int, float]] = []
        number = 0
        while True:
            try:
                candidate = stream.send(news) if number else next(stream)
            except StopIteration:
                return
            assert candidate is not None, "it always has one"
            (score,) = yield [candidate]
            news = [(number, score)]
            number += 1

    def stream(self, space: Space[C]) -> Stream[C]:
        """Yield one more at every call; those without a score yet count as bad ones."""
        require_at_least(1, n_evaluations=self.n_evaluations, n_startup=self.n_startup)
        optuna = _optuna()
        study = optuna.create_study(direction="maximize", sampler=self._sampler(optuna))
        complete = optuna.trial.TrialState.COMPLETE
        trials: list[Any] = []
        told: set[int] = set()
        misfits = 0
        while len(trials) < self.n_evaluations:
            trial = study.ask()

            def decide(gene: str, n: int, trial: Any = trial) -> int:
                return trial.suggest_categorical(gene, range(n))

            try:
                candidate = space.build(decide)
            except SpecError:
                trial.set_user_attr(VIOLATION, 1.0)
                study.tell(trial, 0.0)
                misfits += 1
                if misfits == MISFITS and not trials:
                    raise
                if misfits == MISFITS:
                    return
                continue
            trial.set_user_attr(VIOLATION, -1.0)
            trials.append(trial)
            misfits = 0
            for number, score in (yield candidate):
                if number not in told:
                    study.tell(trials[number], score)
                    told.add(number)
                    continue
                old = trials[number]
                study.add_trial(
                    optuna.trial.create_trial(
                        state=complete,
                        value=score,
                        params=old.params,
                        distributions=old.distributions,
                        user_attrs=old.user_attrs,
                    )
                )

    def _sampler(self, optuna: Any) -> Any:
        return optuna.samplers.TPESampler(
            seed=self.seed % 2**32,
            n_startup_trials=self.n_startup,
            n_ei_candidates=24,
            gamma=_good,
            multivariate=False,
            group=False,
            constant_liar=True,
            constraints_func=lambda trial: (trial.user_attrs[VIOLATION],),
        )


def _good(n: int) -> int:
    """How many of n results count as good."""
    return min(-(-n // 10), 25)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise SpecError(
            "TPE: optuna is missing; pip install 'kizzasi-models[optuna]', or use another searcher"
        ) from error
    return optuna
