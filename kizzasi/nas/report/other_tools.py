"""A run for other tools: as an optuna study, and as TensorBoard event files. Both need an extra.

Both may be made while the run goes on, and show what is there.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from kizzasi.errors import StudyError
from kizzasi.nas.report.figures import trainings
from kizzasi.nas.results.finals import Event
from kizzasi.nas.results.summary import Standing, Summary, proxies_of, summarise
from kizzasi.nas.results.words import said
from kizzasi.nas.study.journal import read_run

Gene = str | int | float


def to_optuna(run: Path, storage: Any = None) -> Any:
    """A run as an `optuna.Study`, for its plots, importances and dashboard.

    The objective is the held-out score.

    A candidate is a trial: its genes are the parameters, its scores on the rungs intermediate
    values at their tokens. It is COMPLETE at the deepest rung anyone reached, with that score as
    its value; PRUNED on an earlier one; FAIL if no rung scored it; WAITING if none trained it.

    Args:
        run: folder of the search.
        storage: as for `optuna.create_study`; None keeps the study in memory.

    Returns:
        The optuna.Study.

    Raises:
        StudyError: optuna is missing, or there is no journal in the folder.
    """
    optuna = _extra("optuna", "optuna", "to_optuna")
    summary = summarise(read_run(run / "journal.jsonl"))
    study = optuna.create_study(
        storage=storage, direction="minimize" if summary.metric.lower_is_better else "maximize"
    )
    for name in summary.study.keys() - {"event"}:
        study.set_user_attr(name, summary.study[name])
    genes = {entry["id"]: genotype(entry) for entry in summary.entries}
    distributions = {
        name: _distribution(optuna, values) for name, values in _columns(genes.values()).items()
    }
    deepest = summary.rungs[-1].name if summary.rungs else ""
    standings = {s.entry["id"]: s for s in summary.standings}
    finals = {final.entry["id"]: final.by_seed for final in summary.finals}
    for entry in summary.entries:
        own = genes[entry["id"]]
        standing = standings[entry["id"]]
        keys = ("id", "name", "group", "family", "params", "state_bytes", "latency_ms", "parents")
        facts = {key: entry[key] for key in keys if key in entry}
        scores = finals.get(entry["id"], {})
        seeds = {str(seed): score for seed, score in scores.items()}
        study.add_trial(
            optuna.trial.create_trial(
                **_outcome(optuna.trial.TrialState, standing, deepest),
                params=own,
                distributions={name: distributions[name] for name in own},
                user_attrs={**facts, "proxies": proxies_of(entry), "final": seeds},
            )
        )
    return study


def _outcome(states: Any, standing: Standing, deepest: str) -> dict[str, Any]:
    """State, value and intermediate values of an optuna trial."""
    scored = [t for t in standing.trials if t["score"] is not None]
    reached = {t["tokens"]: t["score"] for t in scored}
    if not standing.trials:
        return {"state": states.WAITING}
    if not scored:
        return {"state": states.FAIL}
    if scored[-1]["rung"] != deepest:
        return {"state": states.PRUNED, "intermediate_values": reached}
    value = scored[-1]["score"]
    return {"state": states.COMPLETE, "value": value, "intermediate_values": reached}


def genotype(entry: Event) -> dict[str, Gene]:
    """A candidate's genes, nested ones by their path; read off its spec if it brings none."""
    given = entry.get("genotype")
    if given is not None:
        return _flat(given)
    spec = entry["spec"]
    genes = {"family": entry["family"], "d_model": spec["d_model"], "n_layers": len(spec["blocks"])}
    return genes | {
        f"{part}.{key}": value
        for part in ("mixer", "channel")
        for key, value in _flat(spec["blocks"][0][part] or {}).items()
    }


def _flat(value: Any, path: str = "") -> dict[str, Gene]:
    """Leaves by path; truth values and other kinds as text, what is absent not at all."""
    if isinstance(value, Mapping):
        items = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, Sequence) and not isinstance(value, str):
        items = [(str(i), inner) for i, inner in enumerate(value)]
    elif value is None:
        return {}
    else:
        plain = isinstance(value, (str, int, float)) and not isinstance(value, bool)
        return {path or "gene": value if plain else str(value)}
    found: dict[str, Gene] = {}
    for key, inner in items:
        found |= _flat(inner, f"{path}.{key}" if path else key)
    return found


def _columns(rows: Any) -> dict[str, list[Gene]]:
    columns: dict[str, list[Gene]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return columns


def _distribution(optuna: ModuleType, values: list[Gene]) -> Any:
    """The narrowest one that holds all values; a column of mixed kinds is a set of choices."""
    numbers = [v for v in values if not isinstance(v, str)]
    kinds = optuna.distributions
    if len(numbers) < len(values):
        return kinds.CategoricalDistribution(list(dict.fromkeys(values)))
    if all(isinstance(v, int) for v in numbers):
        return kinds.IntDistribution(min(numbers), max(numbers))
    return kinds.FloatDistribution(float(min(numbers)), float(max(numbers)))


def to_tensorboard(run: Path, folder: Path) -> Path:
    """Write learning curves, scores and hyper-parameters as TensorBoard event files.

    One sub-folder per training, named by candidate, learning rate and seed. Steps are tokens.

    Args:
        run: folder of the search.
        folder: where `tensorboard --logdir` will look; must be new or empty, since event files
            would add up.

    Returns:
        folder.

    Raises:
        StudyError: tensorboard is missing, the folder holds something, or there is no journal.
    """
    with warnings.catch_warnings():  # tensorboard's own, of its generated code
        warnings.simplefilter("ignore", DeprecationWarning)
        writer = _extra("torch.utils.tensorboard", "tensorboard", "to_tensorboard").SummaryWriter
    summary = summarise(read_run(run / "journal.jsonl"))
    if folder.exists() and any(folder.iterdir()):
        raise StudyError(f"{folder}: holds files already; give a new folder")
    for entry, trial in trainings(summary):
        name = f"{entry['id']}-{_word(trial['settings'])}-seed{trial['seed']}-{trial['rung']}"
        with writer(str(folder / re.sub(r"[^\w.+-]", "_", name))) as board:  # names are foreign
            _write_training(board, summary, entry, trial)
    return folder


def _write_training(board: Any, summary: Summary, entry: Event, trial: Event) -> None:
    for tokens, loss in trial["curve"]:
        if loss is not None:
            board.add_scalar("training loss", loss, tokens)
    training = trial["id"].rpartition("-")[0]
    rungs = [t for t in summary.trials if t["id"].rpartition("-")[0] == training]
    scored = [t for t in rungs if t["score"] is not None]
    for one in scored:
        board.add_scalar(f"held-out {summary.metric.name}", one["score"], one["tokens"])
    facts = {"candidate": entry["name"], "group": entry["group"], **trial["settings"]}
    genes = {**facts, "seed": trial["seed"], "params": entry["params"], **genotype(entry)}
    last = {f"hparam/{summary.metric.name}": scored[-1]["score"]} if scored else {}
    board.add_hparams(genes, last, run_name=".")


def _extra(module: str, extra: str, who: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise StudyError(f"{who}: {error}; pip install 'kizzasi-models[{extra}]'") from error


def _word(settings: Mapping[str, Any]) -> str:
    """Settings as a part of a file's name."""
    return said(settings).replace(", ", "-").replace(" ", "")
