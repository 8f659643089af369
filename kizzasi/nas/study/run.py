"""One run of a search: candidates, sweeps of the settings, rungs, and the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kizzasi.errors import StudyError
from kizzasi.models import ModelSpec
from kizzasi.nas.evaluators.zero_cost import Batch
from kizzasi.nas.results.words import gist, said
from kizzasi.nas.schedulers import Instalment, Schedule
from kizzasi.nas.schedulers.halving import Halving
from kizzasi.nas.schedulers.schedule import FAILED
from kizzasi.nas.searchers import NSGA2, AskTell
from kizzasi.nas.searchers.screened import Screened
from kizzasi.nas.spaces.constraints import Feasible
from kizzasi.nas.spaces.space import Space
from kizzasi.nas.study.candidates import (
    Entrants,
    Given,
    ProxyPool,
    Recorded,
    baseline_entries,
    costs,
    zero_cost,
)
from kizzasi.nas.study.config import INHERIT
from kizzasi.nas.study.final_training import FinalTraining
from kizzasi.nas.study.plan import Plan
from kizzasi.nas.study.screens import Screen
from kizzasi.nas.study.study import Entry, Study, Trial, score_of
from kizzasi.train.seeds import derive_seed
from kizzasi.train.task import Shape

KEPT_CHECKPOINTS = 64  # on each rung; who is promoted without one is trained anew up to its rung
PROXY_SHAPE = (64, 4)  # length and number of the windows that zero-cost proxies look at
ALIKE = 5  # trials that fail for one reason, before any succeeds, end the search


class Run:
    """One run of a search, from the first candidate or along the journal, to the result.

    Args:
        plan: what decides the result.
        study: begun.
        device: where latency, memory and screens are measured.
    """

    def __init__(self, plan: Plan, study: Study, device: str) -> None:
        self.plan, self.study, self.device = plan, study, device
        self.rules = Recorded(replace(plan.constraints, device=device), study)
        self.feasible = Feasible(plan.space, self.rules, stem=plan.stem)
        self.settings: dict[str, dict[str, Any]] = {}  # by family
        self.budgets = plan.budgets
        self.schedule = self._schedule()

    def _schedule(self) -> Schedule[Entry]:
        plan = self.plan
        usual = baseline_entries(plan.baselines, self.rules)
        if isinstance(plan.searcher, ProxyPool):
            searcher = Given([*usual, *plan.searcher.entries(plan.space, self.rules, plan.stem)])
        else:
            objectives = costs if isinstance(plan.searcher, NSGA2) else None
            first = [candidate for candidate in plan.first if self.feasible.admits(candidate)]
            searcher = Entrants(plan.searcher, usual, plan.stem, objectives, first)

        def group_of(candidate: int) -> str:
            return schedule.candidates[candidate].group

        scheduler = plan.scheduler
        if isinstance(scheduler, Halving):
            scheduler = replace(scheduler, group_of=group_of)
        schedule: Schedule[Any] = Schedule(scheduler, AskTell(searcher, self._screened()))
        return schedule

    def _screened(self) -> Space[Any]:
        """The feasible candidates behind the screens, the cheapest screen first."""
        plan = self.plan
        space: Space[Any] = self.feasible
        for by in plan.screens:
            screen = Screen(by, plan, self.study, self._batch, self._last_trial, self.device)
            space = Screened(space, screen, plan.screen_width)
        return space

    def _last_trial(self, spec: ModelSpec) -> Trial | None:
        """The last training of a model whose checkpoint is kept."""
        return next((trial for trial in self._promotable() if trial.entry.spec == spec), None)

    def to_the_end(self) -> None:
        """Climb the rungs, train the finalists, save the best, write the result."""
        while jobs := self._next_jobs():
            entries = [self.schedule.candidates[job.candidate] for job in jobs]
            for entry in entries:
                self._enter(entry)
            self._sweep(entries)
            trials = [self._trial(job) for job in jobs]
            old = self.study.has(trials)
            results = self.study.run(trials)
            self._stop_if_all_fail_alike()
            for job, trial in zip(jobs, trials, strict=True):
                score = results[trial.id]["score"]
                told = None if score is None else -score_of(results[trial.id], self.plan.metric)
                self.schedule.tell(job, told)
            if not old:
                self.study.keep(self._promotable())
        FinalTraining(self.plan, self.study, self._standings(), self.settings, self.device).run(
            self.schedule.steps, self.feasible.refused
        )

    def _stop_if_all_fail_alike(self) -> None:
        """Raise StudyError when the first trials have all failed for one reason."""
        trials = list(self.study.done.values())
        if len(trials) < ALIKE or any(trial["score"] is not None for trial in trials):
            return
        reasons = {gist(trial["failure"] or "no finite score") for trial in trials}
        if len(reasons) == 1:
            raise StudyError(f"all {len(trials)} trials failed alike: {reasons.pop()}")

    def _next_jobs(self) -> list[Instalment]:
        """What runs side by side: within the budget, and not more than the scores of one batch
        should decide together. Where no score leads the search, all at once."""
        plan, schedule, jobs = self.plan, self.schedule, []
        spent_so_far = schedule.steps
        while plan.at_once or len(jobs) < plan.side_by_side:
            spent = plan.budget is not None and spent_so_far >= plan.budget
            job = None if spent else next(iter(schedule.ask()), None)
            if job is None:
                break
            budgets = [0, *schedule.scheduler.budgets(job.candidate)]
            spent_so_far += job.budget - budgets[budgets.index(job.budget) - 1]
            jobs.append(job)
        return jobs

    def _trial(self, job: Instalment) -> Trial:
        entry, budgets = self.schedule.candidates[job.candidate], self.budgets
        rung = str(budgets.index(job.budget))
        chosen = self.settings[entry.family]
        return Trial(entry, rung, self.plan.seed, chosen, job.budget, budgets[-1])

    def _enter(self, entry: Entry) -> None:
        def event() -> dict[str, Any]:
            if not self.plan.proxies:
                return entry.to_event()
            proxies = zero_cost(entry.spec, self.plan.proxies, self._batch(), self.plan.seed)
            return {**entry.to_event(), **proxies}

        self.study.once("candidate", event, id=entry.id)

    def _batch(self) -> Batch:
        training = self.plan.micro_training
        shape = Shape(min(PROXY_SHAPE[0], training.recipe.seq_len), PROXY_SHAPE[1])
        seed = derive_seed(self.plan.seed, "proxies")
        return next(iter(training.task.batches("train", seed, 0, shape)))

    def _sweep(self, entries: Sequence[Entry]) -> None:
        """Each new family's best settings at the lowest budget, on its first entries."""
        plan, study = self.plan, self.study
        first: dict[str, list[Entry]] = {}
        for entry in entries:
            if entry.family not in self.settings:
                first.setdefault(entry.family, []).append(entry)
        grid = plan.grid
        first = {family: members[: plan.n_sweep] for family, members in first.items()}
        if len(grid) == 1:
            self.settings.update(dict.fromkeys(first, grid[0]))
            return
        trials = {
            (family, said(chosen)): [
                Trial(e, "0", plan.seed, chosen, self.budgets[0], self.budgets[-1]) for e in members
            ]
            for family, members in first.items()
            for chosen in grid
        }
        results = study.run([t for ts in trials.values() for t in ts])
        for family, members in first.items():
            scores = {
                said(chosen): self._mean(results, trials[family, said(chosen)]) for chosen in grid
            }
            best = min(grid, key=lambda chosen: scores[said(chosen)])
            self.settings[family] = best
            for chosen in grid:
                study.forget(trials[family, said(chosen)] if chosen != best else ())
            sign = plan.metric.sign
            named = {k: None if s == float("inf") else sign * s for k, s in scores.items()}
            found = {"candidate": members[0].id, "scores": named, "settings": best}
            study.once("settings", lambda found=found: found, family=family)

    def _mean(self, results: dict[str, dict[str, Any]], trials: Sequence[Trial]) -> float:
        return sum(score_of(results[t.id], self.plan.metric) for t in trials) / len(trials)

    def _promotable(self) -> list[Trial]:
        """The last trials of those that train on, and of the best that rest on each rung; of those
        that can train no further only where children inherit their weights."""
        results, scheduler = self.schedule.results, self.schedule.scheduler
        inherit = INHERIT in self.plan.screens
        resting: dict[int, list[tuple[float, int]]] = {}
        for candidate in range(len(self.schedule.candidates)):
            if (scores := results.scores(candidate)) and scores[-1] != FAILED:
                resting.setdefault(len(scores), []).append((-scores[-1], candidate))
        kept = set(scheduler.survivors(results))
        for told in resting.values():
            kept.update(candidate for _, candidate in sorted(told)[:KEPT_CHECKPOINTS])
        found = []
        for candidate in kept:
            budgets, n = scheduler.budgets(candidate), len(results.scores(candidate))
            if 0 < n < len(budgets) + inherit:
                found.append(self._trial(Instalment(candidate, budgets[n - 1])))
        return found

    def _standings(self) -> list[tuple[Entry, bool]]:
        """Everyone with a score, by rung and score, and whether every training succeeded."""
        schedule, found = self.schedule, []
        for candidate, entry in enumerate(schedule.candidates):
            scores = schedule.results.scores(candidate)
            budgets = zip(scores, schedule.scheduler.budgets(candidate), strict=False)
            sound = [(-budget, -score) for score, budget in budgets if score != FAILED]
            if sound:
                found.append((min(sound), entry, len(sound) == len(scores)))
        found.sort(key=lambda place: place[0])
        return [(entry, sound) for _, entry, sound in found]
