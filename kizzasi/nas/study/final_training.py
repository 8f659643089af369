"""The end of a search: train the finalists anew, save the best, write the result.

Everything is decided on valid: who wins, and the seed whose weights are saved. The test split, if
there is one, is read after that, and only for the result.

What it adds to the events that `kizzasi.nas.study.study` lists:

narrow     with `slope_seeds`: candidate, spec, params and trials (ids, of rung "narrow") of the
           finalist's twin at about half of the parameters, or nulls and the refusal that says why
           there is none
result     equal_params {params, finalists, noise}; slopes and double_size {finalists, noise}, or
           null without `slope_seeds`: figures of `results.equal_terms`, each finalist as
           {candidate, mean, spread}
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kizzasi.errors import SpecError, StudyError
from kizzasi.models import ModelSpec
from kizzasi.nas.evaluators.micro_training import MicroTrain
from kizzasi.nas.executors.elsewhere import Elsewhere
from kizzasi.nas.results.equal_terms import result_figures, sized
from kizzasi.nas.results.finals import FINAL, TEST, TWIN, Event, Final, falling, twins
from kizzasi.nas.results.noise import noise_of
from kizzasi.nas.results.summary import NEVER_WIN
from kizzasi.nas.results.words import gist
from kizzasi.nas.spaces.resize import resized
from kizzasi.nas.study.folder import BEST, contents, spec_in
from kizzasi.nas.study.plan import Plan
from kizzasi.nas.study.sample import write_sample
from kizzasi.nas.study.study import Entry, Study, Trial
from kizzasi.train.bytes import ByteText

SAME_SIZE = 1.02  # times the parameters of the best baseline: no larger than it
Standings = Sequence[tuple[Entry, bool]]


@dataclass(frozen=True)
class FinalTraining:
    """Final trainings, their winner, and the result. All of it goes through the journal.

    Args:
        plan: of the search.
        study: whose rungs are done.
        standings: everyone with a score, best first, and whether every training succeeded.
        chosen: the settings of an entry.
        device: where the best model is made anew.
    """

    plan: Plan
    study: Study
    standings: Standings
    chosen: Callable[[Entry], Mapping[str, Any] | None]
    device: str

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
            means = {own: f.mean for own, f in finals.items() if f.mean is not None}
            if any(_wins(finals[own]) for own in means):
                break
        searched = {own: mean for own, mean in means.items() if _wins(finals[own])}
        if not searched:
            reason = next(iter(finals.values())).trials[0]["failure"]
            raise StudyError(f"every final training failed, that of the best with: {reason}")
        winner = min(searched, key=searched.__getitem__)
        best = min(means, key=means.__getitem__)
        seeds = finals[best].by_seed
        self._save(entries[best], min(seeds, key=seeds.__getitem__))
        evaluator = self.plan.evaluator
        if isinstance(evaluator, MicroTrain) and isinstance(evaluator.task, ByteText):
            write_sample(study, study.checkpoints.parent / BEST)
        self._train_twins(list(entries.values()))
        finals = self._tested(finals, entries)
        found = {"best": best, **self._found(finals, winner)}
        study.once("result", lambda: {**found, "tokens": tokens, "refused": dict(refused)})
        study.keep(())

    def _by_turns(self) -> Iterator[list[Entry]]:
        """The best searched candidates and the best baseline; for when all of these searched ones
        fail, the next best, and so on. Those no larger than the baseline come first."""
        fit, n = [entry for entry, sound in self.standings if sound], self.plan.finals.n
        searched = [entry for entry in fit if entry.group not in NEVER_WIN]
        if not searched:
            failures = [e["failure"] for e in self.study.events if e.get("failure")]
            reason = f"; the last failure: {gist(failures[-1])}" if failures else ""
            raise StudyError(
                "no searched candidate finished a training; if the journal holds failures, see "
                f"their reasons, else raise --search-tokens or --candidates{reason}"
            )
        baseline = [e for e in fit if e.group == "preset"][:1]
        if self.plan.finals.size_matched and baseline:
            most = SAME_SIZE * baseline[0].params
            searched.sort(key=lambda entry: entry.params > most)  # stable: else in their order
        yield [*searched[:n], *baseline]
        for start in range(n, len(searched), n):
            yield searched[start : start + n]

    def _trained(self, entries: Sequence[Entry]) -> dict[str, Final]:
        trials = {e.id: self._trials(e, FINAL, self.plan.finals.seeds) for e in entries}
        results = self.study.run([t for ts in trials.values() for t in ts])
        sign = self.plan.metric.sign
        return {
            e.id: Final(e.to_event(), tuple(falling(results[t.id], sign) for t in trials[e.id]))
            for e in entries
        }

    def _tested(
        self, finals: Mapping[str, Final], entries: Mapping[str, Entry]
    ) -> dict[str, Final]:
        """The finalists' scores on test, where there is one."""
        evaluator = self.plan.evaluator
        if not (
            self.plan.finals.test
            and isinstance(evaluator, MicroTrain)
            and evaluator.task.has("test")
        ):
            return dict(finals)
        found, sign = dict[str, Final](), self.plan.metric.sign
        for own, final in finals.items():
            trials = self._trials(entries[own], FINAL, self.plan.finals.seeds)
            sound = [trial for trial in trials if trial.seed in final.by_seed]
            tests = [replace(trial, rung=TEST, split="test") for trial in sound]
            results = self.study.run(tests)
            found[own] = replace(final, tests=tuple(falling(results[t.id], sign) for t in tests))
        return found

    def _trials(self, entry: Entry, rung: str, n_seeds: int) -> list[Trial]:
        """Trainings with seeds that no rung has seen."""
        horizon, chosen = self.plan.final_budget, self.chosen(entry)
        assert chosen is not None, "who was scored has settings"
        seeds = range(self.plan.seed + 1, self.plan.seed + 1 + n_seeds)
        return [Trial(entry, rung, seed, chosen, horizon, horizon) for seed in seeds]

    def _save(self, entry: Entry, seed: int) -> None:
        """Put the best model's weights, or what its evaluator left of it, into the folder best."""
        study, folder = self.study, self.study.checkpoints.parent / BEST
        told = study.find("saved")
        there = contents(folder)
        if there and (told is None or told["files"] != there):
            self._require_own(folder, entry, told)
        over = study.find("result") is not None  # 0.1 wrote no event "saved"
        as_told = told and (told["candidate"], told["seed"]) == (entry.id, seed)
        if there and (over if told is None else as_told):
            return  # saved before the run was interrupted
        trials = self._trials(entry, FINAL, self.plan.finals.seeds)
        job = study.job(next(t for t in trials if t.seed == seed))
        path, evaluator = job.checkpoint, self.plan.evaluator
        assert path is not None, "a study keeps checkpoints"
        if not path.exists() and not isinstance(study.executor, Elsewhere):
            study.executor.submit(job)  # its checkpoint is gone: once more
            study.executor.collect(study.bar)
        try:
            if isinstance(evaluator, MicroTrain):
                training = evaluator.training(replace(job, device=self.device))
                training.restore(path)
                training.model.eval().save_pretrained(folder, overwrite=True)
            elif path.is_dir():
                shutil.copytree(path, folder, dirs_exist_ok=True)
            else:
                folder.mkdir(exist_ok=True)
                entry.spec.to_file(folder / "spec.yaml")
        except OSError as error:
            raise StudyError(f"{folder}: {error.strerror}; make room, then --resume") from error
        study.append(
            {"event": "saved", "candidate": entry.id, "seed": seed, "files": contents(folder)}
        )

    def _require_own(self, folder: Path, entry: Entry, told: Event | None) -> None:
        """Raise StudyError where somebody else has written into the folder best."""
        spec = spec_in(folder) if told is None else None  # a kill between model and event
        if told is not None or spec not in (None, entry.spec):
            raise StudyError(
                f"{folder}: holds a model that this search did not write; move it away, then "
                "--resume"
            )

    def _train_twins(self, entries: Sequence[Entry]) -> None:
        """Every finalist once more at about half of the parameters, on the same tokens."""
        trials: list[Trial] = []
        for entry in entries if self.plan.finals.slope_seeds else ():
            event = self.study.once(TWIN, lambda e=entry: self._twin(e), candidate=entry.id)
            if event["spec"] is not None:
                trials += self._twin_trials(entry, ModelSpec.from_dict(event["spec"]))
        self.study.run(trials)

    def _twin(self, entry: Entry) -> Event:
        try:
            spec = resized(entry.spec, entry.params // 2)
        except SpecError as error:
            return {"spec": None, "params": None, "trials": [], "refusal": str(error)}
        params, ids = spec.cost(1).params, [t.id for t in self._twin_trials(entry, spec)]
        return {"spec": spec.to_dict(), "params": params, "trials": ids, "refusal": None}

    def _twin_trials(self, entry: Entry, spec: ModelSpec) -> list[Trial]:
        twin = replace(entry, spec=spec, params=spec.cost(1).params)
        return self._trials(twin, TWIN, self.plan.finals.slope_seeds)

    def _found(self, finals: Mapping[str, Final], winner: str) -> Event:
        study, ranked = self.study, list(finals.values())
        preset = next((own for own, f in finals.items() if f.entry["group"] == "preset"), None)
        noise = noise_of(ranked)
        sign = self.plan.metric.sign
        events = [event for _, event in study.journal.scan(TWIN)]
        done = (t for event in events for t in event["trials"] if t in study.scores)
        known = [falling(study.result(trial), sign) for trial in done]
        pairs = sized(ranked, twins(events, known))
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
                {
                    "candidate": own,
                    "mean": None if f.mean is None else sign * f.mean,
                    "spread": f.spread,
                    "trials": trials(own),
                }
                for own, f in finals.items()
            ],
            "noise": noise and asdict(noise),
            "ties": [
                own
                for own, final in finals.items()
                if noise and own != winner and final.scores and noise.tied(finals[winner], final)
            ],
            **result_figures(ranked, pairs, reference, sign),
        }


def _wins(final: Final) -> bool:
    """Whether it may win."""
    return final.entry["group"] not in NEVER_WIN
