"""The main job: find a good model for your task and your budget.

    a searcher proposes candidates that keep all bounds; baselines take part beside them
      -> screens, if there are any, choose each proposal among a few draws
      -> settings (learning rate) per family, by a small sweep at the lowest budget
      -> a scheduler says who trains on to the next rung, from its checkpoint
      -> the best, and the best baseline, trained anew at a longer budget over several seeds

Baselines (in a named search the families' usual proportions at the same budget) go through the same
rungs by the same rules. Searchers begin with those that lie in the space. The winner is the best
searched candidate; where a baseline is better, the result says so first and keeps its weights.

Nothing is decided by a clock: a search is a function of its plan and of the order in which its
results came, which the journal keeps. So a resumed run walks along its journal and goes on from
there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

from kizzasi.errors import SpecError
from kizzasi.models import ModelSpec
from kizzasi.nas.evaluators.evaluator import Evaluator
from kizzasi.nas.evaluators.micro_training import MicroTrain
from kizzasi.nas.executors import (
    NO_LIMITS,
    Executor,
    InProcess,
    Kind,
    Limits,
    Processes,
    open_executor,
)
from kizzasi.nas.executors.files import serve
from kizzasi.nas.executors.work import Work
from kizzasi.nas.report.found import Found
from kizzasi.nas.report.live import Live
from kizzasi.nas.report.pages import write_report
from kizzasi.nas.schedulers import Scheduler
from kizzasi.nas.searchers import Searcher
from kizzasi.nas.spaces.constraints import Constraints
from kizzasi.nas.spaces.describe import name_of
from kizzasi.nas.spaces.joint import Joint
from kizzasi.nas.spaces.model_space import ModelSpace
from kizzasi.nas.spaces.ready_made import definition
from kizzasi.nas.spaces.space import Space
from kizzasi.nas.spaces.stem import Stem
from kizzasi.nas.study.candidates import ProxyPool
from kizzasi.nas.study.config import SearchConfig
from kizzasi.nas.study.config_file import write_config
from kizzasi.nas.study.flow import Flow
from kizzasi.nas.study.folder import CONFIG, claimed
from kizzasi.nas.study.identity import begin
from kizzasi.nas.study.named import plan_of
from kizzasi.nas.study.outline import final_tokens_at_most, tokens_at_most
from kizzasi.nas.study.plan import Finals, Plan
from kizzasi.nas.study.run import Run
from kizzasi.nas.study.session import session_of
from kizzasi.nas.study.study import Study
from kizzasi.nas.study.warm import warmed
from kizzasi.nas.study.waves import Waves
from kizzasi.progress import Line
from kizzasi.train.files import said_of
from kizzasi.train.memory import require_memory
from kizzasi.train.open import open_task
from kizzasi.train.task import Metric, Shape, Task


@dataclass(frozen=True)
class Search:
    """A search made of objects. `run` starts or resumes it in its folder.

    Args:
        space: of candidates: ours, or your own `Space`.
        evaluator: trains and scores a candidate: a `MicroTrain`, or any function of (job, report)
            that returns a score or a `Measurement`.
        searcher: proposes candidates.
        scheduler: says who trains on, and to which budgets.
        folder: where journal, report and the best model go.
        metric: what a function's scores are: a `Metric`, or its name if less is better.
        stem: of every model, for spaces that name none; that of the task, if there is one.
        constraints: that candidates keep.
        baselines: models to beat, as a sequence or by name.
        enqueue: candidates of the space, or models in it, that the searcher begins with.
        settings: by name, the values among which a short sweep chooses for each family, such as
            {"lr": (1e-3, 3e-3)}.
        n_sweep: candidates of a family that share a sweep.
        genes: by name, values of settings that a candidate brings with it: proposed, mutated and
            crossed with its architecture, such as {"lr": (1e-3, 3e-3), "weight_decay": (0.0, 0.1)};
            "dropout" is that of the model. The sweep over `settings` then is of baselines alone.
        finals: the last trainings.
        executor: makes what runs the trials: `InProcess`, or partial(Processes, n_workers=8).
        seed: of everything random.
        side_by_side: None: a free worker gets the next training at once. A number: that many are
            decided on at once, and the number of workers does not change the result.
        budget: no training on the rungs starts beyond this sum; None for no limit.
        proxies: zero-cost proxies to record, with a MicroTrain.
    """

    space: Space[Any]
    evaluator: Evaluator
    searcher: Searcher | ProxyPool = field(kw_only=True)
    scheduler: Scheduler = field(kw_only=True)
    folder: Path | str = field(kw_only=True)
    metric: Metric | str | None = field(default=None, kw_only=True)
    stem: Stem | None = field(default=None, kw_only=True)
    constraints: Constraints = field(default_factory=Constraints, kw_only=True)
    baselines: Sequence[ModelSpec] | Mapping[str, ModelSpec] = field(default=(), kw_only=True)
    enqueue: Sequence[Any] = field(default=(), kw_only=True)
    settings: Mapping[str, Sequence[Any]] = field(default_factory=dict, kw_only=True)
    n_sweep: int = field(default=1, kw_only=True)
    genes: Mapping[str, Sequence[Any]] = field(default_factory=dict, kw_only=True)
    finals: Finals = field(default_factory=Finals, kw_only=True)
    executor: Callable[[Evaluator], Executor] = field(default=InProcess, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    side_by_side: int | None = field(default=None, kw_only=True)
    budget: int | None = field(default=None, kw_only=True)
    proxies: tuple[str, ...] = field(default=(), kw_only=True)

    def run(self, *, resume: bool = False, warm: Sequence[Path | str] = ()) -> Found:
        """Run to the end, or along the journal and on from there.

        Args:
            resume: go on with the run in the folder.
            warm: folders of earlier runs of the same task; their candidates come first, and what
                they trained is not trained again. Copied into the journal.

        Raises:
            StudyError: the folder holds a run already (without resume), or another search's.
            SpecError: a part breaks a rule.
        """
        return run_plan(self.plan(), Path(self.folder), self.executor, resume=resume, warm=warm)

    @property
    def _space(self) -> Space[Any]:
        return Joint(self.space, self.genes) if self.genes else self.space

    def work(self, device: str = "cpu", patience: float = 600.0) -> int:
        """Be a worker of this search, which runs elsewhere with an executor of `Files`.

        Args:
            device: of the trials here.
            patience: seconds to wait for a search that has not begun, or is gone.

        Returns:
            How many trials ended here.
        """
        evaluator: Evaluator = self.evaluator
        if isinstance(evaluator, MicroTrain):
            evaluator = Work(evaluator, self.seed)
        return serve(Path(self.folder), evaluator, device, patience=patience)

    def _member(self, one: Any) -> Any:
        """A candidate of the space, also where its model is given. Raises SpecError."""
        found, space = one, self._space
        if isinstance(one, ModelSpec) and isinstance(space, (ModelSpace, Joint)):
            found = space.encode(one)
        if found is None or not space.contains(found):
            raise SpecError(f"enqueue: {one!r:.80} does not lie in the space; widen that")
        return found

    def plan(self) -> Plan:
        """Everything that decides the result. Raises SpecError."""
        task = self.evaluator.task if isinstance(self.evaluator, MicroTrain) else None
        metric = Metric(self.metric) if isinstance(self.metric, str) else self.metric
        if metric is None:
            if task is None:
                raise SpecError('metric: a function of yours needs one; give metric="..."')
            metric = task.metric
        baselines = self.baselines
        if not isinstance(baselines, Mapping):
            baselines = {f"{name_of(spec)} preset": spec for spec in baselines}
        parts = {
            "space": definition(self.space),
            "evaluator": _named(self.evaluator),
            "searcher": repr(self.searcher),
            "scheduler": repr(self.scheduler),
            "constraints": repr(self.constraints),
            "baselines": [spec.digest[:12] for spec in baselines.values()],
            **({"enqueue": [repr(one)[:200] for one in self.enqueue]} if self.enqueue else {}),
            "settings": {name: list(values) for name, values in self.settings.items()},
            "n_sweep": self.n_sweep,
            **({"genes": {name: list(v) for name, v in self.genes.items()}} if self.genes else {}),
            "finals": repr(self.finals),
            "seed": self.seed,
            "side_by_side": self.side_by_side,
            "budget": self.budget,
        }
        return Plan(
            space=self._space,
            evaluator=self.evaluator,
            metric=metric,
            searcher=self.searcher,
            scheduler=self.scheduler,
            stem=self.stem if task is None else task.stem,
            constraints=self.constraints,
            baselines=baselines,
            settings=self.settings,
            n_sweep=self.n_sweep,
            finals=self.finals,
            seed=self.seed,
            side_by_side=self.side_by_side,
            budget=self.budget,
            first=[self._member(one) for one in self.enqueue],
            proxies=self.proxies,
            described=parts,
        )


def named_search(
    config: SearchConfig,
    folder: Path,
    space: Any = None,
    *,
    task: Task | None = None,
    resume: bool = False,
    workers: int | None = 1,
    device: str = "cpu",
    executor: Kind | None = None,
    threads: int | None = None,
    limits: Limits = NO_LIMITS,
    address: str = "local",
    warm: Sequence[Path | str] = (),
) -> Found:
    """Run the search that a config describes; what the command line does.

    Args:
        config: what decides the result.
        folder: where journal, report and the best model go.
        space: candidates, in place of the config's space.
        task: what to learn, in place of the config's data.
        resume: go on with the run in the folder.
        workers: trials side by side; does not change the result. None: as many as there is room.
        device: "cpu" or "cuda".
        executor, threads, limits, address: where trials run and what each may take; see
            `open_executor`.
        warm: folders of earlier runs that it begins with; see `Search.run`.

    Raises:
        StudyError: the folder holds a run already (without resume), or another config's.
        DataError, SpecError: the data, the space or the config break a rule.
    """
    config.check()

    def opened(evaluator: Evaluator) -> Executor:
        return open_executor(evaluator, executor, workers, threads, limits, address, device, folder)

    with Line("search") as line:
        line.say("reading the data")
        task = task or open_task(
            config.data, test_fraction=config.test_fraction, apart=folder, test=config.test
        )
        plan = plan_of(config, task, space)
        total = tokens_at_most(config, len(plan.baselines))
        return run_plan(
            plan, folder, opened, resume=resume, total=total, device=device, config=config,
            line=line, warm=warm,
        )  # fmt: skip


def run_plan(
    plan: Plan,
    folder: Path,
    executor: Callable[[Evaluator], Executor],
    *,
    resume: bool = False,
    total: int | None = None,
    device: str = "cpu",
    config: SearchConfig | None = None,
    line: Line | None = None,
    warm: Sequence[Path | str] = (),
    proposed: Sequence[ModelSpec] = (),
) -> Found:
    """Run a plan in a folder; see `Search.run`. Its config, if it has one, is put there as YAML,
    and how far it is, on a line. Models proposed from outside take part from now on."""
    plan.check()
    if not resume:
        plan.check_steps()
    line = line or Line("search")
    evaluator: Evaluator = plan.evaluator
    if isinstance(evaluator, MicroTrain):
        recipe, task = evaluator.recipe, evaluator.task
        task.check(Shape(recipe.seq_len, recipe.batch_size, recipe.score_windows), task.stem)
        evaluator = Work(evaluator, plan.seed)
    with (
        _fitting(executor(evaluator), plan) as running,
        claimed(folder, resume=resume) as journal,
        line,
    ):
        live = Live(plan.metric, len(plan.budgets))

        def follow(event: dict[str, Any]) -> None:
            live.tell(event)
            line.say(live.text)

        line.say(live.text)
        study = Study(folder, journal, running, line, follow)
        begin(study, plan)
        plan = warmed(plan, study, warm)
        live.told(event for _, event in journal.scan())
        if left_out := (study.find("study") or {}).get("data", {}).get("left_out"):
            line.write(f"{line.name}: {said_of(left_out)}")
        line.count_to(total, live.tokens, at_most=True)
        line.say(live.text)
        if config is not None:
            write_config(config, folder / CONFIG)
        run, session = Run(plan, study, device), session_of(running, plan.searcher)
        if plan.side_by_side is None:
            Flow(run, session, proposed).climb()
        else:
            if proposed:
                run.propose(proposed)  # which says why not
            study.begin(session)
            Waves(run, plan.side_by_side).climb()
        if total is not None:  # so many on the rungs are no bound any more, but known
            line.count_to(live.tokens + final_tokens_at_most(plan), live.tokens, at_most=True)
        run.train_finalists()
        return Found(folder, write_report(folder, study.events))


def _fitting(running: Executor, plan: Plan) -> Executor:
    """The executor. Raises SpecError if a baseline plainly does not fit in memory where it runs; of
    other machines nobody here knows."""
    evaluator = plan.evaluator
    if isinstance(evaluator, MicroTrain) and isinstance(running, (InProcess, Processes)):
        limits = running.workers[0].limits if isinstance(running, Processes) else NO_LIMITS
        for spec in plan.baselines.values():
            require_memory(spec, evaluator.recipe, running.device, limits.memory_bytes)
    return running


def _named(evaluator: Any) -> str:
    """What tells one evaluator from another: its settings, or the name of a function."""
    if isinstance(evaluator, MicroTrain):
        return repr(evaluator.recipe)
    own = evaluator if isinstance(evaluator, FunctionType) else type(evaluator)
    return f"{own.__module__}.{own.__qualname__}"
