"""Trainings in waves: a wave is decided on together, and ends before the next begins.

Workers wait for the slowest of their wave. In return the result does not depend on how many there
are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kizzasi.nas.schedulers import Instalment
from kizzasi.nas.study.run import Run
from kizzasi.nas.study.study import Entry


@dataclass(frozen=True)
class Waves:
    """Climb the rungs in waves.

    Args:
        run: of the search.
        size: trainings in a wave.
    """

    run: Run
    size: int

    def climb(self) -> None:
        """Until nothing is left to train."""
        run = self.run
        while jobs := self._next_jobs():
            entries = [run.schedule.candidates[job.candidate] for job in jobs]
            self._enter(entries)
            self._sweep(entries)
            trials = [run.trial(job) for job in jobs]
            old = run.study.has(trials)
            results = run.study.run(trials)
            run.stop_if_all_fail_alike()
            for job, trial in zip(jobs, trials, strict=True):
                run.tell(job, results[trial.id])
            if not old:
                run.study.keep(run.promotable())

    def _next_jobs(self) -> list[Instalment]:
        """What runs side by side: within the budget, and not more than the scores of one batch
        should decide together. Where no score leads the search, all at once."""
        plan, schedule, jobs = self.run.plan, self.run.schedule, []
        spent_so_far = schedule.steps
        while plan.at_once or len(jobs) < self.size:
            spent = plan.budget is not None and spent_so_far >= plan.budget
            job = None if spent else next(iter(schedule.ask()), None)
            if job is None:
                break
            spent_so_far += self.run.increment(job)
            jobs.append(job)
        return jobs

    def _enter(self, entries: Sequence[Entry]) -> None:
        study = self.run.study
        if self.run.plan.proxies:
            new = {e.id: e for e in entries if not study.knows("candidate", id=e.id)}
            study.all_of([self.run.entering(entry) for entry in new.values()])
        for entry in entries:
            study.once("candidate", entry.to_event, id=entry.id)

    def _sweep(self, entries: Sequence[Entry]) -> None:
        """Each new family's best settings at the lowest budget, on its first entries."""
        plan, run = self.run.plan, self.run
        first: dict[str, list[Entry]] = {}
        for entry in entries:
            if run.chosen(entry) is None:
                first.setdefault(entry.family, []).append(entry)
        first = {family: members[: plan.n_sweep] for family, members in first.items()}
        if len(plan.grid) == 1:
            run.settings.update(dict.fromkeys(first, plan.grid[0]))
            return
        run.study.run([t for own in first.values() for e in own for t in run.sweep_trials(e)])
        for family, members in first.items():
            run.settle(family, members)
