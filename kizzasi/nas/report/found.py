"""`Found`: what a search found, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kizzasi.models import ModelSpec, SequenceModel, load
from kizzasi.nas.report.export import export
from kizzasi.nas.report.pages import table
from kizzasi.nas.results.finals import Final
from kizzasi.nas.results.summary import Summary
from kizzasi.nas.searchers import pareto_front
from kizzasi.nas.spaces.resize import stretched


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A candidate that was trained anew at the final budget.

    Args:
        name: for people.
        spec: its architecture.
        params: embeddings included.
        score: mean over the seeds; on test where there is one. None if every training failed.
        scores: by seed.
        searched: False for a baseline.
    """

    name: str
    spec: ModelSpec
    params: int
    score: float | None
    scores: dict[int, float]
    searched: bool


@dataclass(frozen=True)
class Found:
    """What a search found. Plain values; `summary` has everything else.

    Args:
        folder: of the run.
        summary: of its journal.
    """

    folder: Path
    summary: Summary = field(repr=False)

    @property
    def best(self) -> Finalist:
        """The best model, whose weights are kept: the winner, or a baseline that beat it."""
        assert self.summary.saved is not None, "a finished search has a best model"
        return self._finalist(self.summary.saved)

    @property
    def winner(self) -> Finalist:
        """The best searched candidate."""
        assert self.summary.winner is not None, "a finished search has a winner"
        return self._finalist(self.summary.winner)

    @property
    def finals(self) -> list[Finalist]:
        """Everyone who was trained anew, best first."""
        return [self._finalist(final) for final in self.summary.finals]

    @property
    def front(self) -> list[ModelSpec]:
        """The models that no other beats in both score and parameters, on the deepest rung."""
        deepest = self.summary.rungs[-1].name
        points = {
            s.entry["id"]: (s.entry["params"], score)
            for s in self.summary.standings
            if (score := s.score(deepest)) is not None
        }
        names = list(points)
        specs = {s.entry["id"]: s.entry["spec"] for s in self.summary.standings}
        front = pareto_front(list(points.values()))
        return [ModelSpec.from_dict(specs[names[i]]) for i in front]

    @property
    def table(self) -> str:
        """Everyone who took part, and the conclusions, for a terminal."""
        return table(self.summary)

    def model(self, device: str = "cpu") -> SequenceModel:
        """The best model with its weights.

        Raises:
            CheckpointError: the evaluator left none that can be loaded.
        """
        return load(self.folder / "best", device=device)

    def at(self, n_params: int) -> ModelSpec:
        """The best model's design at another budget: its layers stacked, and all of it wider.

        Raises:
            SpecError: no such model is valid and within a factor of 1.4 of n_params.
        """
        return stretched(self.best.spec, n_params)

    def export(self, out: Path | str) -> Path:
        """Weights, spec, model card and a script that runs it, in a folder of their own."""
        return export(self.folder, Path(out))

    def _finalist(self, final: Final) -> Finalist:
        sign = self.summary.metric.sign
        return Finalist(
            name=final.entry["name"],
            spec=ModelSpec.from_dict(final.entry["spec"]),
            params=final.entry["params"],
            score=None if final.mean is None else sign * final.mean,
            scores={seed: sign * score for seed, score in final.by_seed.items()},
            searched=final.entry["group"] != "preset",
        )
