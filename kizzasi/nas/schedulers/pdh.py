"""Progressive dynamic hurdles: to train on, be better than the population's mean.

m = generation;  h_k = hurdle k;  s_k = budgets[k] - budgets[k-1], the steps added by hurdle k-1
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from kizzasi.errors import SpecError
from kizzasi.nas.schedulers.schedule import FAILED, Results, Told
from kizzasi.nas.searchers.ask_tell import require_at_least


@dataclass(frozen=True)
class PDH:
    """Raise a hurdle after every m candidates, at the mean fitness of the population then.

        h_k = mean fitness of the population's members that were trained to stages[k],
              set when (k + 1) * m candidates have entered the population

    A candidate above h_k at stages[k] trains on, from its own checkpoint, to stages[k+1]; at the
    first hurdle that it does not clear, or that does not exist yet, it enters the population with
    the fitness it has there. Meant to go with `Evolution`, which is told that fitness.

    Args:
        n_candidates: how many to start; more than m for each hurdle.
        stages: rising budgets; one hurdle between each two. Who ends at the first one is never
            reconsidered, so it has to be long enough for late bloomers.
        generation: m, at least 1. The first m * (len(stages) - 1) candidates that do not fail come
            too early for the last stage.
        population_size: members; the oldest leaves when another enters. At least 1.

    Source: So et al. 2019, "The Evolved Transformer", arXiv:1901.11117, on PDH.
    Differs: the population ages, as in Real et al. 2019, arXiv:1802.01548, where the original
        kills the worst of a tournament. A failed candidate neither enters it nor counts in m. A
        hurdle waits until the population has a member at its stage.
    """

    n_candidates: int
    stages: tuple[int, ...]
    generation: int
    population_size: int

    def check(self) -> None:
        """Raises SpecError naming the setting and the rule."""
        require_at_least(1, generation=self.generation, population_size=self.population_size)
        rising = all(a < b for a, b in zip((0, *self.stages), self.stages, strict=False))
        if not self.stages or not rising:
            raise SpecError(f"stages: {self.stages} must be rising budgets above 0")
        least = self.generation * (len(self.stages) - 1) + 1
        if self.n_candidates < least:
            raise SpecError(
                f"n_candidates: {self.n_candidates} end before the budget {self.stages[-1]} opens; "
                f"give at least {least}, fewer stages or a smaller generation"
            )

    def budgets(self, candidate: int) -> Sequence[int]:
        return self.stages if candidate < self.n_candidates else ()

    def survivors(self, results: Results) -> Sequence[int]:
        """Return who cleared its last hurdle and has not trained on, in the order they did."""
        return list(self._state(results).going_on)

    def hurdles(self, results: Results) -> Sequence[float]:
        """Return the hurdles that stand after these results."""
        return self._state(results).hurdles

    def _state(self, results: Results) -> _State:
        return results.fold(self, lambda: _State(deque(maxlen=self.population_size)), self._step)

    def _step(self, state: _State, told: Told) -> None:
        candidate, rung, score = told
        state.going_on.pop(candidate, None)
        if score == FAILED:
            return
        hurdles = state.hurdles
        if rung < len(hurdles) and score > hurdles[rung]:
            state.going_on[candidate] = None
            return
        state.population.append((rung, score))
        state.entered += 1
        stage = len(hurdles)
        peers = [score for rung, score in state.population if rung == stage]
        ready = state.entered >= (stage + 1) * self.generation and stage + 1 < len(self.stages)
        if peers and ready:
            hurdles.append(fmean(peers))


@dataclass
class _State:
    """The population's (rung, fitness), the hurdles, who goes on, and how many have entered."""

    population: deque[tuple[int, float]]
    hurdles: list[float] = field(default_factory=list)
    going_on: dict[int, None] = field(default_factory=dict)
    entered: int = 0
