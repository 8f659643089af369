"""The main job: find a good small sequence model for your bytes and your budget.

    a searcher proposes candidates that keep all bounds; presets take part beside them
      -> screens, if there are any, choose each proposal among a few draws
      -> learning rate per family, by a small sweep at the lowest budget
      -> a scheduler says who trains on to the next rung, from its checkpoint
      -> the best, and the best preset, trained anew at a longer budget over several seeds

Presets (the families' usual proportions at the same budget) go through the same rungs by the same
rules. Searchers begin with those that lie in the space, but a preset never wins: the winner has to
beat the best of them.

Nothing is decided by a clock: a search is a function of its config and its scores, told in the
order asked for. So a resumed run walks through its journal and goes on from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kizzasi.errors import StudyError
from kizzasi.models import presets
from kizzasi.nas.evaluators.micro_training import MicroTrain
from kizzasi.nas.executors import NO_LIMITS, Executor, Kind, Limits, open_executor
from kizzasi.nas.report.pages import write_report
from kizzasi.nas.spaces.families import ArchSearchSpace
from kizzasi.nas.spaces.model_space import ModelSpace
from kizzasi.nas.spaces.ready_made import SMALL_SPACE, definition, read_space
from kizzasi.nas.study.candidates import (
    VOCAB,
)
from kizzasi.nas.study.config import SearchConfig
from kizzasi.nas.study.journal import Journal
from kizzasi.nas.study.named import constraints_of, scheduler_of
from kizzasi.nas.study.run import Run
from kizzasi.nas.study.study import Study
from kizzasi.train.bytes import ByteCorpus, baselines, duplicate_share, load_corpus
from kizzasi.train.recipe import Recipe

__all__ = ["SMALL_SPACE", "VOCAB", "Search", "SearchConfig"]


@dataclass(frozen=True)
class Search:
    """A search in a folder. `run` starts or resumes it.

    Args:
        config: what decides the result.
        folder: where journal, report and winner go.
        space: candidates, in place of the config's space.
        workers: trials side by side; does not change the result. None: as many as there is room.
        device: "cpu" or "cuda".
        executor, threads, limits, address: where trials run and what each may take; see
            `open_executor`.
    """

    config: SearchConfig
    folder: Path
    space: ArchSearchSpace | ModelSpace | None = None
    workers: int | None = 1
    device: str = "cpu"
    executor: Kind | None = None
    threads: int | None = None
    limits: Limits = NO_LIMITS
    address: str = "local"

    def run(self, *, resume: bool = False) -> list[dict[str, Any]]:
        """Run to the end; returns all events of the journal.

        Raises:
            StudyError: the folder holds a run already (without resume), or another config's.
            DataError, SpecError: the data, the space or the config break a rule.
        """
        self.config.check()
        constraints_of(self.config).check()
        scheduler_of(self.config, 0, str).check()
        space = self.space or read_space(self.config.space)
        if isinstance(space, ArchSearchSpace):
            space.check()
        corpus = load_corpus(self.config.data)
        if (self.folder / "journal.jsonl").exists() and not resume:
            raise StudyError(f"{self.folder}: holds a run already; use --resume or another name")
        with (
            self._executor(corpus) as executor,
            Journal(self.folder / "journal.jsonl") as journal,
            tqdm(
                total=_tokens_at_most(self.config), unit="tok", unit_scale=True, desc="search"
            ) as bar,
        ):
            study = Study(self.folder, journal, executor, bar)
            self._begin(study, corpus, space)
            Run(self.config, study, space, self.device).to_the_end()
            write_report(self.folder, study.events)
        return study.events

    def _executor(self, corpus: ByteCorpus) -> Executor:
        config = self.config
        recipe = Recipe(
            horizon=config.budgets[-1],
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            score_windows=config.score_windows,
        )
        evaluator = MicroTrain(corpus, recipe, self.device)
        return open_executor(
            evaluator, self.executor, self.workers, self.threads, self.limits, self.address
        )

    def _begin(self, study: Study, corpus: ByteCorpus, space: ArchSearchSpace | ModelSpace) -> None:
        """Write down what the run is; a resumed run must be the same one."""
        facts = {
            "name": corpus.name,
            "digest": corpus.digest,
            "n_bytes": corpus.n_bytes,
            "n_held_out": len(corpus.held_out),
        }
        config = {**self.config.to_dict(), "template": definition(space)}
        event = study.once(
            "study",
            lambda: {
                "config": config,
                "corpus": {**facts, "repeated": duplicate_share(corpus)},
                "baselines": baselines(corpus),
            },
        )
        now = {**_json(config), "corpus": corpus.digest}
        then = {**_json(SearchConfig().to_dict()), **event["config"]}  # new options: not used then
        then["corpus"] = event["corpus"]["digest"]
        if changed := [key for key in now if now[key] != then.get(key)]:
            given = ", ".join(f"{k}: {then.get(k)} then, {now[k]} now" for k in changed)
            raise StudyError(f"{self.folder}: cannot resume another search; {given:.300}")


def _tokens_at_most(config: SearchConfig) -> int:
    """What the bar counts to: a rough upper bound, since failed trials stop early."""
    n, total, before = config.n_candidates + len(presets.SMALL), 0, 0
    if config.searcher == "proxy":
        n = len(presets.SMALL) + config.n_best + config.n_random + config.n_outside
    for tokens in config.budgets:
        total += n * (tokens - before)
        before, n = tokens, max(2, round(config.keep * n)) + 1
    total = config.search_tokens or total
    sweeps = (len(presets.SMALL) + config.n_sweep) * (len(config.lrs) - 1) * config.budgets[0]
    seeds = config.final_seeds + config.slope_seeds
    return total + sweeps + (1 + config.n_finalists) * seeds * config.final_tokens


def _json(value: Any) -> Any:
    """Plain data as the journal gives it back: tuples are lists."""
    if isinstance(value, dict):
        return {k: _json(v) for k, v in value.items()}
    return [_json(v) for v in value] if isinstance(value, (list, tuple)) else value
