"""One run of a search: candidates, sweeps of the learning rate, rungs, and the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from kizzasi.models import ModelSpec, presets
from kizzasi.nas.evaluators.zero_cost import Batch
from kizzasi.nas.schedulers import Job, Schedule
from kizzasi.nas.schedulers.schedule import FAILED
from kizzasi.nas.searchers import Search as Proposing
from kizzasi.nas.searchers.screened import Screened
from kizzasi.nas.spaces.constraints import Feasible
from kizzasi.nas.spaces.families import ArchSearchSpace
from kizzasi.nas.spaces.model_space import ModelSpace
from kizzasi.nas.spaces.space import Space
from kizzasi.nas.study.candidates import (
    VOCAB,
    Entrants,
    Given,
    Recorded,
    costs,
    main_mixer,
    pool,
    preset_entries,
    zero_cost,
)
from kizzasi.nas.study.config import INHERIT, SearchConfig
from kizzasi.nas.study.final_training import Finish
from kizzasi.nas.study.named import constraints_of, scheduler_of, searcher_of
from kizzasi.nas.study.screens import Screen
from kizzasi.nas.study.study import Entry, Study, Trial, score_of
from kizzasi.train.bytes import batches
from kizzasi.train.seeds import derive_seed

KEPT_CHECKPOINTS = 64  # on each rung; who is promoted without one is trained anew up to its rung
PROXY_SHAPE = (64, 4)  # length and number of the windows that zero-cost proxies look at


class Run:
    """One run of a search, from the first candidate or along the journal, to the result.

    Args:
        config: what decides the result.
        study: begun.
        space: of candidates.
        device: where latency and memory are measured, if they are bounded.
    """

    def __init__(
        self, config: SearchConfig, study: Study, space: ArchSearchSpace | ModelSpace, device: str
    ) -> None:
        self.config, self.study, self.device = config, study, device
        self.rules = Recorded(constraints_of(config, device), study)
        searched: Space[Any] = cast("Space[Any]", space)
        self.feasible = Feasible(searched, self.rules, vocab_size=VOCAB)
        self.lrs: dict[str, float] = {}
        self.n_sweep = config.n_sweep if isinstance(space, ModelSpace) else 1
        self.schedule = self._schedule(space)

    def _schedule(self, space: ArchSearchSpace | ModelSpace) -> Schedule[Entry]:
        config = self.config
        families = presets.SMALL
        if isinstance(space, ArchSearchSpace):
            families = [t for t in space.model_types if t in presets.SMALL]
        usual = preset_entries(config, families, self.rules)
        seed = derive_seed(config.seed, "candidates")
        if config.searcher == "proxy":
            assert isinstance(space, ArchSearchSpace), "checked by the config"
            searcher = Given([*usual, *pool(config, space, self.rules, seed)])
        else:
            searcher = Entrants(
                searcher_of(config, seed),
                usual,
                main_mixer if isinstance(space, ModelSpace) else (lambda c: c.model_type),
                costs if config.searcher == "nsga2" else None,
                self._known(space, usual),
            )

        def group_of(candidate: int) -> str:
            return schedule.candidates[candidate].group

        scheduler = scheduler_of(config, len(usual), group_of)
        schedule: Schedule[Any] = Schedule(scheduler, Proposing(searcher, self._screened()))
        return schedule

    def _known(self, space: ArchSearchSpace | ModelSpace, usual: Sequence[Entry]) -> list[Any]:
        """The presets that lie in the space: searchers begin with them."""
        if isinstance(space, ArchSearchSpace):
            return []
        found = [space.encode(entry.spec) for entry in usual]
        return [candidate for candidate in found if candidate and self.feasible.admits(candidate)]

    def _screened(self) -> Space[Any]:
        """The feasible candidates behind the screens, the cheapest screen first."""
        config, space = self.config, cast("Space[Any]", self.feasible)
        for by in config.screens:
            screen = Screen(
                by,
                self.study,
                self._batch,
                self._last_trial,
                config.screen_tokens,
                config.seed,
                self.device,
            )
            space = Screened(space, screen, config.screen_width)
        return space

    def _last_trial(self, spec: ModelSpec) -> Trial | None:
        """The last training of a model whose checkpoint is kept."""
        return next((trial for trial in self._promotable() if trial.entry.spec == spec), None)

    def to_the_end(self) -> None:
        """Climb the rungs, train the finalists, save the winner, write the result."""
        while jobs := self._next_jobs():
            entries = [self.schedule.candidates[job.candidate] for job in jobs]
            for entry in entries:
                self._enter(entry)
            self._sweep(entries)
            trials = [self._trial(job) for job in jobs]
            old = self.study.has(trials)
            results = self.study.run(trials)
            for job, trial in zip(jobs, trials, strict=True):
                score = results[trial.id]["bits_per_byte"]
                self.schedule.tell(job, None if score is None else -score)
            if not old:
                self.study.keep(self._promotable())
        finish = Finish(self.config, self.study, self._standings(), self.lrs)
        finish.run(self.schedule.steps, self.feasible.refused)

    def _next_jobs(self) -> list[Job]:
        """What runs side by side: within the token budget, and not more than the scores of one
        batch should decide together. Where no score leads the search, all at once."""
        config, schedule, jobs = self.config, self.schedule, []
        at_once = config.scheduler == "halving" and config.searcher in ("proxy", "random")
        tokens = schedule.steps
        while at_once or len(jobs) < config.side_by_side:
            spent = config.search_tokens is not None and tokens >= config.search_tokens
            job = None if spent else next(iter(schedule.ask()), None)
            if job is None:
                break
            budgets = [0, *schedule.scheduler.budgets(job.candidate)]
            tokens += job.budget - budgets[budgets.index(job.budget) - 1]
            jobs.append(job)
        return jobs

    def _trial(self, job: Job) -> Trial:
        entry, budgets = self.schedule.candidates[job.candidate], self.config.budgets
        rung = str(budgets.index(job.budget))
        lr = self.lrs[entry.family]
        return Trial(entry, rung, self.config.seed, lr, job.budget, budgets[-1])

    def _enter(self, entry: Entry) -> None:
        def event() -> dict[str, Any]:
            proxies = zero_cost(entry.spec, self.config.proxies, self._batch(), self.config.seed)
            return {**entry.to_event(), **proxies}

        self.study.once("candidate", event, id=entry.id)

    def _batch(self) -> Batch:
        corpus = self.study.executor.evaluator.corpus
        return next(batches(corpus.train, *PROXY_SHAPE, derive_seed(self.config.seed, "proxies")))

    def _sweep(self, entries: Sequence[Entry]) -> None:
        """Each new family's best learning rate at the lowest budget, on its first entries."""
        config, study = self.config, self.study
        first: dict[str, list[Entry]] = {}
        for entry in entries:
            if entry.family not in self.lrs:
                first.setdefault(entry.family, []).append(entry)
        first = {family: members[: self.n_sweep] for family, members in first.items()}
        trials = {
            (family, lr): [
                Trial(e, "0", config.seed, lr, config.budgets[0], config.budgets[-1])
                for e in members
            ]
            for family, members in first.items()
            for lr in config.lrs
        }
        results = study.run([t for ts in trials.values() for t in ts])
        for family, members in first.items():
            scores = {lr: _mean(results, trials[family, lr]) for lr in config.lrs}
            self.lrs[family] = best = min(scores, key=scores.__getitem__)
            for lr in config.lrs:
                study.forget(trials[family, lr] if lr != best else ())
            named = {f"{lr:g}": None if s == float("inf") else s for lr, s in scores.items()}
            found = {"candidate": members[0].id, "scores": named, "lr": best}
            study.once("lr", lambda found=found: found, family=family)

    def _promotable(self) -> list[Trial]:
        """The last trials of those that train on, and of the best that rest on each rung; of those
        that can train no further only where children inherit their weights."""
        results, scheduler = self.schedule.results, self.schedule.scheduler
        inherit = INHERIT in self.config.screens
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
                found.append(self._trial(Job(candidate, budgets[n - 1])))
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


def _mean(results: dict[str, dict[str, Any]], trials: Sequence[Trial]) -> float:
    return sum(score_of(results[t.id]) for t in trials) / len(trials)
