"""Trainings as workers become free: no worker waits while something can run.

What a free worker is given depends on the results that are there by then. The journal has them in
the order in which they came, and says with every session how many places there were. So a resumed
run decides everything as it was decided, along the journal, and goes on from there.

Glossary
    task      one job of a worker: a candidate's proxies, one trial of a sweep, or a training
    place     one of the executor's; a task in a place is running
    held      asked for, and waiting for the sweep of its family
    early     in the journal before this search asks for it, as it was then a smaller one
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kizzasi.errors import StudyError
from kizzasi.models import ModelSpec
from kizzasi.nas.results.finals import APART
from kizzasi.nas.schedulers import Instalment
from kizzasi.nas.study.run import Run
from kizzasi.nas.study.study import Entry, Task, Trial

Event = dict[str, Any]
PROPOSED = "proposed"
TIDY_EVERY = 8  # results, or more, between looks at which checkpoints are still wanted


@dataclass
class Sweep:
    """A family that looks for its settings: who is tried, what is left, and who waits."""

    members: list[Entry] = field(default_factory=list)
    left: set[str] = field(default_factory=set)
    held: list[Instalment] = field(default_factory=list)


class Flow:
    """Climb the rungs as workers become free.

    Args:
        run: of the search.
        session: what the journal's session event says of this machine.
        proposed: models of the user's that take part from now on.

    Journal:
        proposed    specs of such models; they go before what the searcher draws next
    """

    def __init__(self, run: Run, session: Event, proposed: Sequence[ModelSpec] = ()) -> None:
        self.run, self.study, self.session = run, run.study, session
        self.proposed = proposed
        self.places, self.live, self.spent = 0, False, 0
        self.n_taken, self.tidy_at = 0, TIDY_EVERY
        self.ready: deque[tuple[Task, Callable[[Event], None]]] = deque()
        self.running: dict[str, tuple[Task, Callable[[Event], None]]] = {}
        self.early: dict[str, Event] = {}
        self.sweeps: dict[str, Sweep] = {}
        self.n_held = 0
        self.taken: set[str] = set()  # trials whose result has been told

    def _recorded(self) -> Iterator[Event]:
        """What happened to places and tasks, in order, up to where the journal ended. A line that
        is there twice counts once."""
        kinds = {"session", PROPOSED, "trial", *(["candidate"] if self.run.plan.proxies else [])}
        seen: set[str | None] = set()
        for _, event in self.study.journal.scan():
            if event["event"] not in kinds or event.get("rung") in APART:
                continue
            key = _key(event) if "id" in event else None
            if key is None or key not in seen:
                seen.add(key)
                yield event

    def climb(self) -> None:
        """Until nothing is left to train."""
        for event in self._recorded():
            if event["event"] == "session":
                self.places = event["places"]
            elif event["event"] == PROPOSED:
                self.run.propose([ModelSpec.from_dict(spec) for spec in event["specs"]])
            else:
                self._replay(event)
            self._fill()
        if self.proposed:
            self.run.propose(self.proposed)
            self.study.append({"event": PROPOSED, "specs": [s.to_dict() for s in self.proposed]})
            self._fill()
        self._go_live()
        self._fill()
        while self.running:
            key, event = self.study.next()
            self._take(key, event)
            self._fill()

    def _replay(self, event: Event) -> None:
        key = _key(event)
        while key not in self.running and self._begin_one():
            pass  # a search that was extended has other tasks in its places
        if key not in self.running and self.study.grown:
            self.early[key] = event
            return
        if key not in self.running:
            folder = self.study.checkpoints.parent
            raise StudyError(
                f"{folder}: the journal has a result that this search does not ask for ({key}); "
                "resume with the version that wrote it, or begin anew"
            )
        self._take(key, event)

    def _go_live(self) -> None:
        self.study.begin(self.session)
        self.places, self.live = self.session["places"], True
        for task, _ in self.running.values():
            self.study.start(task)

    def _fill(self) -> None:
        """Give every free place a task, as far as there are any."""
        while len(self.running) < self.places and self._begin_one():
            pass

    def _begin_one(self) -> bool:
        """Take the next task in hand; False if there is none now."""
        while not self.ready and self._ask():
            pass
        if not self.ready:
            return False
        task, then = self.ready.popleft()
        self.running[task.key] = task, then
        if task.key in self.early:
            self._take(task.key, self.early.pop(task.key))
        elif self.live:
            self.study.start(task)
        return True

    def _take(self, key: str, event: Event) -> None:
        _, then = self.running.pop(key)
        then(event)
        if event["event"] != "trial":
            return
        self.n_taken += 1
        self.run.stop_if_all_fail_alike()
        if self.live and self.n_taken >= self.tidy_at:
            self._tidy()

    def _ask(self) -> bool:
        """Ask the schedule for one more job; False if there is none now."""
        plan, run = self.run.plan, self.run
        over = plan.budget is not None and self.spent >= plan.budget
        if over or self.n_held >= 2 * self.places:
            return False
        job = next(iter(run.schedule.ask()), None)
        if job is None:
            return False
        self.spent += run.increment(job)
        entry = run.schedule.candidates[job.candidate]
        self._enrol(entry)
        task = None if run.schedule.results.scores(job.candidate) else self._entering(entry)
        if task is None:
            self._train(job)
        else:
            self.ready.append((task, lambda _: self._train(job)))
        return True

    def _entering(self, entry: Entry) -> Task | None:
        """The task that a new candidate begins with, if it has one."""
        if self.run.plan.proxies:
            return self.run.entering(entry)
        self.study.once("candidate", entry.to_event, id=entry.id)
        return None

    def _enrol(self, entry: Entry) -> None:
        """Make a candidate a member of its family's sweep, if that wants one. The first asked for
        are members, whoever's proxies are done first."""
        run, grid = self.run, self.run.plan.grid
        if run.chosen(entry) is not None:
            return
        if len(grid) == 1:
            run.settings[entry.family] = grid[0]
            return
        sweep = self.sweeps.setdefault(entry.family, Sweep())
        if len(sweep.members) < run.plan.n_sweep:
            sweep.members.append(entry)
            sweep.left.update(trial.id for trial in run.sweep_trials(entry))

    def _train(self, job: Instalment) -> None:
        """A training at the settings of its family, now or when they are known."""
        entry = self.run.schedule.candidates[job.candidate]
        if self.run.chosen(entry) is not None:
            self._start(self.run.trial(job), job)
            return
        sweep = self.sweeps[entry.family]
        sweep.held.append(job)
        self.n_held += 1
        if any(entry is member for member in sweep.members):
            for trial in self.run.sweep_trials(entry):
                self.ready.append((self.study.task(trial), self._swept(trial, entry.family)))

    def _swept(self, trial: Trial, family: str) -> Callable[[Event], None]:
        def then(event: Event) -> None:
            self.taken.add(trial.id)
            sweep = self.sweeps[family]
            sweep.left.discard(trial.id)
            if not sweep.left:
                del self.sweeps[family]
                self.run.settle(family, sweep.members)
                self.n_held -= len(sweep.held)
                for job in sweep.held:
                    self._start(self.run.trial(job), job)

        return then

    def _start(self, trial: Trial, job: Instalment) -> None:
        """Train, unless the sweep has done it."""
        if trial.id in self.taken:
            self.run.tell(job, self.study.result(trial.id))
        else:
            self.ready.append((self.study.task(trial), lambda event: self.run.tell(job, event)))

    def _tidy(self) -> None:
        """Delete checkpoints that nobody wants any more."""
        busy = {task.job.checkpoint for task, _ in (*self.running.values(), *self.ready)}
        wanted = self.run.promotable()
        self.study.keep(wanted, busy)
        self.tidy_at = self.n_taken + max(TIDY_EVERY, len(wanted) // 8)


def _key(event: Event) -> str:
    """Of the task that an event ended."""
    return event["id"] if event["event"] == "trial" else f"candidate {event['id']}"
