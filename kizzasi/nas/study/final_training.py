"""The end of a search: train the finalists anew, save the winner, write the result.

What it adds to the events that `kizzasi.nas.study.study` lists:

narrow     with `slope_seeds`: candidate, spec, params and trials (ids, of rung "narrow") of the
           finalist's twin at about half of the parameters, or nulls and the refusal that says why
           there is none
result     equal_params {params, finalists, noise}; slopes and double_size {finalists, noise}, or
           null without `slope_seeds`: figures of `results.equal_terms`, each finalist as
           {candidate, mean, spread}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kizzasi.errors import SpecError, StudyError
from kizzasi.models import ModelSpec
from kizzasi.nas.executors import Job
from kizzasi.nas.results.equal_terms import result_figures, sized
from kizzasi.nas.results.finals import FINAL, NARROW, Event, Final, twins
from kizzasi.nas.results.noise import noise_of
from kizzasi.nas.results.summary import NEVER_WIN
from kizzasi.nas.spaces.resize import narrowed
from kizzasi.nas.study.config import SearchConfig
from kizzasi.nas.study.study import Entry, Study, Trial

Standings = Sequence[tuple[Entry, bool]]


@dataclass(frozen=True)
class Finish:
    """Final trainings, their winner, and the result. All of it goes through the journal.

    Args:
        config: of the search.
        study: whose rungs are done.
        standings: everyone with a score, best first, and whether every training succeeded.
        lrs: learning rate by family.
    """

    config: SearchConfig
    study: Study
    standings: Standings
    lrs: Mapping[str, float]

    def run(self, tokens: int, refused: Mapping[str, int]) -> None:
        """Train, save and write.

        Args:
            tokens: trained on rungs.
            refused: by rule, candidates never built.

        Raises:
            StudyError: no searched candidate can be the winner.
        """
        study, finals, entries = self.study, dict[str, Final](), dict[str, Entry]()
        means: dict[str, float] = {}
        for chosen in self._by_turns():
            entries.update({entry.id: entry for entry in chosen})
            finals.update(self._trained(chosen))
            means = {own: f.mean for own, f in finals.items() if f.mean is not None and _wins(f)}
            if means:
                break
        if not means:
            reason = next(iter(finals.values())).trials[0]["failure"]
            raise StudyError(f"every final training failed, that of the best with: {reason}")
        winner = min(means, key=means.__getitem__)
        seeds = finals[winner].by_seed
        self._save(entries[winner], min(seeds, key=seeds.__getitem__))
        self._train_twins(list(entries.values()))
        found = self._found(finals, winner)
        study.once("result", lambda: {**found, "tokens": tokens, "refused": dict(refused)})
        study.keep(())

    def _by_turns(self) -> Iterator[list[Entry]]:
        """The best searched candidates and the best preset; for when all of these searched ones
        fail, the next best, and so on."""
        fit, n = [entry for entry, sound in self.standings if sound], self.config.n_finalists
        searched = [entry for entry in fit if entry.group not in NEVER_WIN]
        if not searched:
            raise StudyError(
                "no searched candidate finished a training; if the journal holds failures, see "
                "their reasons, else raise --search-tokens or --candidates"
            )
        yield [*searched[:n], *[e for e in fit if e.group == "preset"][:1]]
        for start in range(n, len(searched), n):
            yield searched[start : start + n]

    def _trained(self, entries: Sequence[Entry]) -> dict[str, Final]:
        trials = {e.id: self._trials(e, FINAL, self.config.final_seeds) for e in entries}
        results = self.study.run([t for ts in trials.values() for t in ts])
        return {
            e.id: Final(e.to_event(), tuple(results[t.id] for t in trials[e.id])) for e in entries
        }

    def _trials(self, entry: Entry, rung: str, n_seeds: int) -> list[Trial]:
        horizon, lr = self.config.final_tokens, self.lrs[entry.family]
        seeds = range(self.config.seed, self.config.seed + n_seeds)
        return [Trial(entry, rung, seed, lr, horizon, horizon) for seed in seeds]

    def _save(self, entry: Entry, seed: int) -> None:
        study, folder = self.study, self.study.checkpoints.parent / "best"
        trial = next(
            t for t in self._trials(entry, FINAL, self.config.final_seeds) if t.seed == seed
        )
        path = study.checkpoint(trial)
        if not path.exists():
            if folder.exists():
                return  # saved before the run was interrupted
            # It was the last rung's training as well, and its checkpoint is gone: once more.
            job = Job(
                trial.id, trial.entry.spec, trial.tokens, trial.seed, trial.lr, trial.horizon, path
            )
            list(study.executor.run([job], study.bar))
        training = study.executor.evaluator.training(trial.entry.spec, trial.seed)
        training.restore(path)
        training.model.eval().save_pretrained(folder, overwrite=True)

    def _train_twins(self, entries: Sequence[Entry]) -> None:
        """Every finalist once more at about half of the parameters, on the same tokens."""
        trials: list[Trial] = []
        for entry in entries if self.config.slope_seeds else ():
            event = self.study.once(NARROW, lambda e=entry: self._twin(e), candidate=entry.id)
            if event["spec"] is not None:
                trials += self._twin_trials(entry, ModelSpec.from_dict(event["spec"]))
        self.study.run(trials)

    def _twin(self, entry: Entry) -> Event:
        try:
            spec = narrowed(entry.spec, entry.params // 2)
        except SpecError as error:
            return {"spec": None, "params": None, "trials": [], "refusal": str(error)}
        params, ids = spec.cost(1).params, [t.id for t in self._twin_trials(entry, spec)]
        return {"spec": spec.to_dict(), "params": params, "trials": ids, "refusal": None}

    def _twin_trials(self, entry: Entry, spec: ModelSpec) -> list[Trial]:
        twin = replace(entry, spec=spec, params=spec.cost(1).params)
        return self._trials(twin, NARROW, self.config.slope_seeds)

    def _found(self, finals: Mapping[str, Final], winner: str) -> Event:
        study, ranked = self.study, list(finals.values())
        preset = next((own for own, f in finals.items() if f.entry["group"] == "preset"), None)
        noise = noise_of(ranked)
        known = [event for event in study.events if event["event"] == "trial"]
        pairs = sized(ranked, twins(study.events, known))
        reference = finals[preset if preset else winner].entry["params"]

        def trials(own: str | None) -> list[Any]:
            return [t["id"] for t in finals[own].trials] if own else []

        return {
            "winner": winner,
            "winner_trials": trials(winner),
            "preset": preset,
            "preset_trials": trials(preset),
            "ranking": [entry.id for entry, _ in self.standings],
            "finalists": [
                {"candidate": own, "mean": f.mean, "spread": f.spread, "trials": trials(own)}
                for own, f in finals.items()
            ],
            "noise": noise and asdict(noise),
            "ties": [
                own
                for own, final in finals.items()
                if noise and own != winner and final.scores and noise.tied(finals[winner], final)
            ],
            **result_figures(ranked, pairs, reference),
        }


def _wins(final: Final) -> bool:
    """Whether it may win."""
    return final.entry["group"] not in NEVER_WIN
