"""One run of a search: who takes part, who trains on, and the end.

The trainings in between are those of `kizzasi.nas.study.flow`, in which no worker waits, or of
`kizzasi.nas.study.waves`, in which the number of workers does not change the result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from kizzasi.errors import StudyError
from kizzasi.models import ModelSpec
from kizzasi.nas.evaluators.evaluator import Job, Measurement
from kizzasi.nas.results.words import gist, said
from kizzasi.nas.schedulers import Extrapolated, Halving, Instalment, Schedule
from kizzasi.nas.schedulers.schedule import FAILED
from kizzasi.nas.searchers import NSGA2, AskTell, Flowing, Streaming
from kizzasi.nas.searchers.screened import Screened
from kizzasi.nas.spaces.constraints import Feasible
from kizzasi.nas.spaces.joint import Joint
from kizzasi.nas.spaces.layer_moves import LayerMoves
from kizzasi.nas.spaces.model_space import ModelSpace
from kizzasi.nas.spaces.space import Space
from kizzasi.nas.study.candidates import (
    EntrySearcher,
    Given,
    ProxyPool,
    Recorded,
    baseline_entries,
    costs,
    entry_of,
)
from kizzasi.nas.study.config import INHERIT
from kizzasi.nas.study.final_training import FinalTraining
from kizzasi.nas.study.plan import Plan
from kizzasi.nas.study.screens import Screen
from kizzasi.nas.study.study import Entry, Study, Task, Trial, falling_score

KEPT_CHECKPOINTS = 64  # on each rung; who is promoted without one is trained anew up to its rung
ALIKE = 5  # trials that fail for one reason, before any succeeds, end the search
UNSCORED = float("inf")


class Run:
    """One run of a search, from the first candidate or along the journal, to the result.

    Args:
        plan: what decides the result.
        study: begun.
        device: where latency and memory are measured.
    """

    def __init__(self, plan: Plan, study: Study, device: str) -> None:
        self.plan, self.study, self.device = plan, study, device
        self.rules = Recorded(replace(plan.constraints, device=device), study)
        space = plan.space
        if isinstance(space, ModelSpace):
            space = LayerMoves(space, plan.first)
        elif isinstance(space, Joint) and isinstance(space.space, ModelSpace):
            given = [one.candidate for one in plan.first]
            space = Joint(LayerMoves(space.space, given), space.genes)
        self.feasible: Feasible[Any] = Feasible(space, self.rules, stem=plan.stem)
        self.settings: dict[str, dict[str, Any]] = {}  # by family
        self.own: deque[Entry] = deque()  # of the user, waiting to enter
        self.budgets = plan.budgets
        self.schedule = self._schedule()

    def _schedule(self) -> Schedule[Entry]:
        plan = self.plan
        usual = baseline_entries(plan.baselines, self.rules)
        plan.check_budget(len(usual))
        streams = plan.side_by_side is None and isinstance(plan.searcher, Streaming)
        if isinstance(plan.searcher, ProxyPool):
            searcher = Given([*usual, *plan.searcher.entries(plan.space, self.rules, plan.stem)])
        else:
            objectives = costs if isinstance(plan.searcher, NSGA2) else None
            first = [candidate for candidate in plan.first if self.feasible.admits(candidate)]
            searcher = EntrySearcher(plan.searcher, usual, plan.stem, objectives, first, self.own)

        def group_of(candidate: int) -> str:
            return schedule.candidates[candidate].group

        scheduler = plan.scheduler
        if isinstance(scheduler, Halving):
            scheduler = replace(scheduler, group_of=group_of)
        space = self._screened()
        if streams and isinstance(searcher, EntrySearcher):
            schedule: Schedule[Any] = Schedule(scheduler, Flowing(searcher.stream(space)))
        else:
            schedule = Schedule(scheduler, AskTell(searcher, space))
        return schedule

    def _screened(self) -> Space[Any]:
        """The feasible candidates behind the screens, the cheapest screen first."""
        space: Space[Any] = self.feasible
        for by in self.plan.screens:
            screen = Screen(by, self.plan, self.study, self._last_trial)
            space = Screened(space, screen, self.plan.screen_width)
        return space

    def _last_trial(self, spec: ModelSpec) -> Trial | None:
        """The last training of a model whose checkpoint is kept."""
        return next((trial for trial in self.promotable() if trial.entry.spec == spec), None)

    def propose(self, specs: Sequence[ModelSpec]) -> None:
        """Let models of the user's take part, those that do not yet.

        Raises:
            StudyError: the search decides on batches, or wants no more candidates.
        """
        schedule = self.schedule
        if not isinstance(schedule.search, Flowing):
            raise StudyError(
                "spec: this search decides on several candidates at once; a spec of your own needs "
                "one without side_by_side, by a searcher such as regularized or random"
            )
        known = {entry.id for entry in (*schedule.candidates, *self.own)}
        entries = [entry_of("searched", spec, self.plan.stem) for spec in specs]
        new = list({entry.id: entry for entry in entries if entry.id not in known}.values())
        n = len(schedule.candidates) + len(self.own)
        if schedule.search.over or (new and not schedule.scheduler.budgets(n + len(new) - 1)):
            raise StudyError(
                f"spec: the search wants no more candidates than those that it has ({n}) and can "
                f"take no {len(new)} more; begin one with more of them (n_pool)"
            )
        self.own.extend(new)

    def train_finalists(self) -> None:
        """Train the finalists, save the best, write the result."""
        FinalTraining(self.plan, self.study, self._standings(), self.chosen, self.device).run(
            self.schedule.steps, self.feasible.refused
        )

    def stop_if_all_fail_alike(self) -> None:
        """Raise StudyError when the first trials have all failed for one reason."""
        study = self.study
        if not study.succeeded and len(study.scores) >= ALIKE and len(study.reasons) == 1:
            reason = next(iter(study.reasons))
            raise StudyError(f"all {len(study.scores)} trials failed alike: {reason}")

    def increment(self, job: Instalment) -> int:
        """What a job adds to what its candidate was trained on."""
        budgets = [0, *self.schedule.scheduler.budgets(job.candidate)]
        return job.budget - budgets[budgets.index(job.budget) - 1]

    def trial(self, job: Instalment) -> Trial:
        """A job at its entry's settings."""
        entry, budgets = self.schedule.candidates[job.candidate], self.budgets
        rung = str(budgets.index(job.budget))
        chosen = self.chosen(entry)
        assert chosen is not None, "a family's settings are known before its members train on"
        return Trial(entry, rung, self.plan.seed, chosen, job.budget, budgets[-1])

    def chosen(self, entry: Entry) -> Mapping[str, Any] | None:
        """The settings that an entry is trained with; None while its family looks for them."""
        return self.settings.get(entry.family) if entry.settings is None else entry.settings

    def tell(self, job: Instalment, event: dict[str, Any]) -> None:
        """A job's score, as the schedule wants it: higher is better."""
        score = event["score"]
        fitness = None if score is None else -falling_score(score, self.plan.metric)
        curves = isinstance(self.plan.scheduler, Extrapolated)  # else nobody looks at them
        self.schedule.tell(job, fitness, event["curve"] if curves else ())

    def entering(self, entry: Entry) -> Task:
        """What writes a candidate down, with its zero-cost proxies."""
        job = Job(
            entry.spec,
            0,
            self.plan.seed,
            {"names": self.plan.proxies},
            key=f"candidate {entry.id}",
            kind="proxies",
        )

        def event(measured: Measurement) -> dict[str, Any]:
            failure = measured.failure and {"proxy_failures": {"all": gist(measured.failure)}}
            nothing = {"proxies": dict.fromkeys(self.plan.proxies), **(failure or {})}
            return {**entry.to_event(), **(measured.facts or nothing)}

        return Task(job, event)

    def sweep_trials(self, entry: Entry) -> list[Trial]:
        """A candidate at the lowest budget, at every setting."""
        return [
            Trial(entry, "0", self.plan.seed, chosen, self.budgets[0], self.budgets[-1])
            for chosen in self.plan.grid
        ]

    def settle(self, family: str, members: list[Entry]) -> None:
        """Choose a family's settings: the best mean over its members' trials in the journal."""
        study, grid = self.study, self.plan.grid
        trials = [self.sweep_trials(entry) for entry in members]
        scores = {
            said(chosen): sum(
                falling_score(study.scores[own[i].id], self.plan.metric) for own in trials
            )
            / len(trials)
            for i, chosen in enumerate(grid)
        }
        best = min(grid, key=lambda chosen: scores[said(chosen)])
        self.settings[family] = best
        for own in trials:
            study.forget([trial for trial in own if trial.settings != best])
        sign = self.plan.metric.sign
        named = {k: None if s == UNSCORED else sign * s for k, s in scores.items()}
        found = {"candidate": members[0].id, "scores": named, "settings": best}
        if edges := at_edges(self.plan.settings, best):
            found["edges"] = edges
        study.once("settings", lambda: found, family=family)

    def promotable(self) -> list[Trial]:
        """The last trials of those that train on, and of the best that rest on each rung; of those
        that can train no further only where children inherit their weights."""
        results, scheduler = self.schedule.results, self.schedule.scheduler
        inherit = INHERIT in self.plan.screens
        kept = dict.fromkeys(scheduler.survivors(results))
        for rung in range(len(self.budgets)):
            kept.update(dict.fromkeys(islice(results.resting(rung), KEPT_CHECKPOINTS)))
        found = []
        for candidate in kept:
            budgets, n = scheduler.budgets(candidate), len(results.scores(candidate))
            if 0 < n < len(budgets) + inherit:
                found.append(self.trial(Instalment(candidate, budgets[n - 1])))
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


def at_edges(grid: Mapping[str, Sequence[Any]], chosen: Mapping[str, Any]) -> dict[str, str]:
    """The settings whose best value is the lowest or the highest that was tried, so that a better
    one may lie beyond."""
    found = {}
    for name, values in grid.items():
        numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
        if len(set(numbers)) == len(values) > 1:
            ends = {min(numbers): "lowest", max(numbers): "highest"}
            if chosen[name] in ends:
                found[name] = ends[chosen[name]]
    return found
