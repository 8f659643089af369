"""The main job: find a good small sequence model for your bytes and your budget.

    candidates in a parameter band -> analytic proxy -> the best by proxy, and as many at random
      -> learning rate per family, by a small sweep at the lowest budget
      -> rungs: train, keep the better part, train on from the checkpoint
      -> the winner, and the best preset, trained anew at a longer budget over several seeds

Presets (the families' usual proportions at the same budget, never searched) go through the same
rungs with the same learning rates; the winner has to beat the best of them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kizzasi.errors import SpecError, StudyError
from kizzasi.models import ModelSpec, presets
from kizzasi.models.strict import Strict
from kizzasi.nas.arch_search import ArchCandidate, ArchSearchSpace
from kizzasi.nas.data import ByteCorpus, baselines, duplicate_share, load_corpus
from kizzasi.nas.executors import Executor, InProcess, Processes
from kizzasi.nas.microtrain import MicroTrain, Recipe
from kizzasi.nas.report import write_report
from kizzasi.nas.rng import Xorshift64
from kizzasi.nas.storage import Journal, derive_seed
from kizzasi.nas.study import Entry, Study, Trial, score_of

VOCAB = 256
STATE_LENGTH = 1024  # tokens at which state sizes are compared
SMALL_SPACE = ArchSearchSpace(
    d_model_options=(48, 64, 80, 96, 112, 128),
    d_state_options=(8, 16, 32),
    n_layers_options=(2, 3, 4, 5, 6),
    model_types=("mamba", "rwkv", "s4", "transformer", "rwkv+transformer", "mamba+transformer"),
    expand_factor_options=(1.0, 1.5, 2.0, 3.0, 4.0),
    dropout_options=(0.0,),
)


@dataclass(frozen=True)
class SearchConfig(Strict):
    """Everything that decides a search's result; written into the journal.

    Args:
        data: a file or folder of bytes, "stdlib", or None for the text that ships with CPython.
        n_params: the parameter budget, embeddings included.
        band: candidates have between (1 - band) and (1 + band) times n_params parameters.
        n_pool: candidates sampled and scored by the proxy.
        n_best, n_random: trained from the pool: the best by proxy, and a random control group.
        n_outside: trained on the first rung only, from outside the band, to see what the proxy is
            worth over all sizes.
        rungs: tokens at each rung, rising.
        keep: share of the candidates that a rung passes on.
        lrs: learning rates of the sweep.
        final_tokens: the winner's and the best preset's budget, trained from scratch.
        final_seeds: how often.
        seq_len, batch_size: of the training windows.
        seed: of everything random.
    """

    data: str | None = None
    n_params: int = 200_000
    band: float = 0.1
    n_pool: int = 200
    n_best: int = 4
    n_random: int = 12
    n_outside: int = 2
    rungs: tuple[int, ...] = (32_768, 98_304)
    keep: float = 0.34
    lrs: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    final_tokens: int = 262_144
    final_seeds: int = 1
    seq_len: int = 128
    batch_size: int = 4
    seed: int = 0

    def check(self) -> None:
        """Raises SpecError naming the value and the rule."""
        counts = ("n_params", "n_pool", "n_best", "final_tokens", "final_seeds", "seq_len")
        self.require_positive("", *counts, "batch_size")
        rising = all(a < b for a, b in zip((0, *self.rungs), self.rungs, strict=False))
        for ok, rule in (
            (0 < self.band < 1, f"band: {self.band} is outside (0, 1)"),
            (0 < self.keep < 1, f"keep: {self.keep} is outside (0, 1)"),
            (self.rungs and rising, f"rungs: {self.rungs} must be rising token counts"),
            (self.lrs and min(self.lrs) > 0, f"lrs: {self.lrs} must be positive"),
            (min(self.n_random, self.n_outside) >= 0, "n_random, n_outside: must not be negative"),
        ):
            if not ok:
                raise SpecError(rule)


@dataclass(frozen=True)
class Search:
    """A search in a folder. `run` starts or resumes it.

    Args:
        config: what decides the result.
        folder: where journal, report and winner go.
        space: candidates; its vocabulary is bytes.
        workers: processes side by side on the CPU; does not change the result.
        device: "cpu" or "cuda".
    """

    config: SearchConfig
    folder: Path
    space: ArchSearchSpace = field(default=SMALL_SPACE)
    workers: int = 1
    device: str = "cpu"

    def run(self, *, resume: bool = False) -> list[dict[str, Any]]:
        """Run to the end; returns all events of the journal.

        Raises:
            StudyError: the folder holds a run already (without resume), or another config's.
            DataError, SpecError: the data or the config break a rule.
        """
        self.config.check()
        self.space.check()
        corpus = load_corpus(self.config.data)
        if (self.folder / "journal.jsonl").exists() and not resume:
            raise StudyError(f"{self.folder}: holds a run already; use --resume or another name")
        with (
            Journal(self.folder / "journal.jsonl") as journal,
            self._executor(corpus) as executor,
            tqdm(total=self._tokens_at_most(), unit="tok", unit_scale=True, desc="search") as bar,
        ):
            study = Study(self.folder, journal, executor, bar)
            self._begin(study, corpus)
            self._run(study)
            write_report(self.folder, study.events)
        return study.events

    def _executor(self, corpus: ByteCorpus) -> Executor:
        config = self.config
        recipe = Recipe(config.rungs[-1], seq_len=config.seq_len, batch_size=config.batch_size)
        evaluator = MicroTrain(corpus, recipe, derive_seed(config.seed, "data"), self.device)
        if self.workers == 1 or self.device != "cpu":
            return InProcess(evaluator)
        threads = max(1, (os.cpu_count() or 1) // self.workers)
        return Processes(evaluator, self.workers, threads)

    def _begin(self, study: Study, corpus: ByteCorpus) -> None:
        """Write down what the run is; a resumed run must be the same one."""
        facts = {
            "name": corpus.name,
            "digest": corpus.digest,
            "n_bytes": corpus.n_bytes,
            "n_held_out": len(corpus.held_out),
        }
        config = {**self.config.to_dict(), "space": dataclasses.asdict(self.space)}
        event = study.once(
            "study",
            lambda: {
                "config": config,
                "corpus": {**facts, "repeated": duplicate_share(corpus)},
                "baselines": baselines(corpus),
            },
        )
        now = {**_json(config), "corpus": corpus.digest}
        then = {**event["config"], "corpus": event["corpus"]["digest"]}
        if changed := [key for key in now if now[key] != then.get(key)]:
            given = ", ".join(f"{k}: {then.get(k)} then, {now[k]} now" for k in changed)
            raise StudyError(f"{self.folder}: cannot resume another search; {given:.300}")

    def _run(self, study: Study) -> None:
        config = self.config
        entries = [self._entered(study, entry) for entry in self._entries()]
        lrs = self._sweep(study, entries)

        def trial(entry: Entry, rung: int) -> Trial:
            tokens, horizon = config.rungs[rung], config.rungs[-1]
            return Trial(entry, str(rung), config.seed, lrs[entry.family], tokens, horizon)

        standing: list[list[Entry]] = [list(entries)]
        for rung in range(len(config.rungs)):
            trials = {e.id: trial(e, rung) for e in standing[-1]}
            results = study.run(list(trials.values()))
            ranked = sorted(
                (e for e in standing[-1] if score_of(results[trials[e.id].id]) < float("inf")),
                key=lambda e: score_of(results[trials[e.id].id]),
            )
            standing[-1] = ranked
            if rung + 1 < len(config.rungs):
                standing.append(self._promoted(ranked, len(trials)))
                kept = {e.id for e in standing[-1]}
                study.forget([t for t in trials.values() if t.entry.id not in kept])
            else:
                study.forget(list(trials.values()))
        self._finish(study, standing, lrs)

    def _promoted(self, ranked: list[Entry], n_trained: int) -> list[Entry]:
        """The better part of those inside the band; the best preset and the best searched one
        always go on, so that there is something to compare."""
        inside = [e for e in ranked if e.group != "outside"]
        kept = inside[: max(2, round(self.config.keep * n_trained))]
        kept += [e for e in inside if e.group == "preset"][:1]
        kept += [e for e in inside if e.group != "preset"][:1]
        return [e for e in inside if e in kept]

    def _finish(self, study: Study, standing: list[list[Entry]], lrs: dict[str, float]) -> None:
        """Retrain the winner and the best preset at the final budget and save the winner."""
        config, last = self.config, standing[-1]
        searched = [e for e in last if e.group != "preset"]
        preset = [e for e in last if e.group == "preset"]
        if not searched:
            raise StudyError("every searched candidate failed; the journal holds the reasons")

        def final(entry: Entry) -> list[Trial]:
            horizon = config.final_tokens
            return [
                Trial(entry, "final", config.seed + i, lrs[entry.family], horizon, horizon)
                for i in range(config.final_seeds)
            ]

        trials = {e.id: final(e) for e in (searched[0], *preset[:1])}
        results = study.run([t for ts in trials.values() for t in ts])
        best = min(trials[searched[0].id], key=lambda t: score_of(results[t.id]))
        if score_of(results[best.id]) == float("inf"):
            raise StudyError(f"the winner's final training failed: {results[best.id]['failure']}")
        self._save_winner(study, best)
        ids = list(dict.fromkeys(e.id for entries in reversed(standing) for e in entries))
        study.once(
            "result",
            lambda: {
                "winner": searched[0].id,
                "winner_trials": [t.id for t in trials[searched[0].id]],
                "preset": preset[0].id if preset else None,
                "preset_trials": [t.id for e in preset[:1] for t in trials[e.id]],
                "ranking": ids,
            },
        )
        study.forget([t for ts in trials.values() for t in ts])

    def _save_winner(self, study: Study, trial: Trial) -> None:
        if not study.checkpoint(trial).exists():
            return  # saved before the run was interrupted
        training = study.executor.evaluator.training(trial.entry.spec, trial.seed)
        training.restore(study.checkpoint(trial))
        training.model.eval().save_pretrained(self.folder / "best")

    def _entered(self, study: Study, entry: Entry) -> Entry:
        study.once("candidate", entry.to_event, id=entry.id)
        return entry

    def _entries(self) -> Iterator[Entry]:
        """Presets, the best by proxy, the random control group, and a few outside the band."""
        config = self.config
        families = [t for t in self.space.model_types if t in presets.SMALL]
        for family in families:
            spec = presets.at_size(family, config.n_params, vocab_size=VOCAB)
            yield _entry("preset", f"{family} preset", family, spec, None)
        rng = Xorshift64(derive_seed(config.seed, "candidates"))
        inside, outside = self._pool(rng)
        ranked = sorted(inside, key=lambda c: -c.proxy_score())
        best = ranked[: config.n_best]
        rest = ranked[config.n_best :]
        rng.shuffle(rest)
        for group, members in (
            ("proxy", best),
            ("random", rest[: config.n_random]),
            ("outside", outside[: config.n_outside]),
        ):
            for c in members:
                yield _entry(group, c.name, c.model_type, c.to_spec(vocab_size=VOCAB), c)

    def _pool(self, rng: Xorshift64) -> tuple[list[ArchCandidate], list[ArchCandidate]]:
        """Distinct real candidates, inside the parameter band and outside of it."""
        config = self.config
        low, high = (config.n_params * (1 + sign * config.band) for sign in (-1, 1))
        inside: dict[str, ArchCandidate] = {}
        outside: dict[str, ArchCandidate] = {}
        for _ in range(max(2000, 20 * config.n_pool)):
            candidate = self.space.sample(rng)
            try:
                spec = candidate.to_spec(vocab_size=VOCAB)
            except SpecError:
                continue  # genes that do not fit each other
            fits = low <= spec.cost(1).params <= high
            (inside if fits else outside).setdefault(spec.digest, candidate)
            if len(inside) == config.n_pool:
                break
        if len(inside) < 2:
            raise StudyError(
                f"n_params: {len(inside)} candidates have {low:.0f} to {high:.0f} parameters; "
                "change --params or widen --band"
            )
        return list(inside.values()), list(outside.values())

    def _sweep(self, study: Study, entries: list[Entry]) -> dict[str, float]:
        """Each family's best learning rate at the lowest budget, on its first entry."""
        config = self.config
        first = {e.family: e for e in reversed(entries)}
        trials = {
            (family, lr): Trial(entry, "0", config.seed, lr, config.rungs[0], config.rungs[-1])
            for family, entry in first.items()
            for lr in config.lrs
        }
        results = study.run(list(trials.values()))
        lrs = {}
        for family, entry in first.items():
            scores = {lr: score_of(results[trials[family, lr].id]) for lr in config.lrs}
            lrs[family] = best = min(scores, key=scores.__getitem__)
            study.forget([trials[family, lr] for lr in config.lrs if lr != best])
            named = {f"{lr:g}": None if s == float("inf") else s for lr, s in scores.items()}
            found = {"candidate": entry.id, "scores": named, "lr": best}
            study.once("lr", lambda found=found: found, family=family)
        return lrs

    def _tokens_at_most(self) -> int:
        """What the bar counts to: an upper bound, since failed trials stop early."""
        config = self.config
        families = len(self.space.model_types)
        n = len(presets.SMALL) + config.n_best + config.n_random + config.n_outside
        total = families * (len(config.lrs) - 1) * config.rungs[0]
        before = 0
        for tokens in config.rungs:
            total += n * (tokens - before)
            before, n = tokens, max(2, round(config.keep * n)) + 1
        return total + 2 * config.final_seeds * config.final_tokens


def _entry(
    group: str, name: str, family: str, spec: ModelSpec, candidate: ArchCandidate | None
) -> Entry:
    cost = spec.cost(STATE_LENGTH)
    return Entry(
        id=spec.digest[:12],
        group=group,
        name=name,
        family=family,
        spec=spec,
        proxy=candidate.proxy_score() if candidate else None,
        params=cost.params,
        estimated_params=candidate.param_count() if candidate else None,
        state_bytes=cost.state_bytes,
    )


def _json(value: Any) -> Any:
    """Plain data as the journal gives it back: tuples are lists."""
    if isinstance(value, dict):
        return {k: _json(v) for k, v in value.items()}
    return [_json(v) for v in value] if isinstance(value, (list, tuple)) else value
