"""Search a good small sequence model for your data; about 3 minutes on 2 cores by default.

example:
  kizzasi search --data ~/notes --params 300000 --out runs/notes
  kizzasi search --data ~/notes --out runs/notes --dry-run     # trials, tokens and minutes
  kizzasi search --resume --out runs/notes                     # knows its own settings
  kizzasi search --resume --out runs/notes --candidates 40     # the same search, and more of it
  kizzasi search --executor ray --address auto --out /shared/runs/first

Killed at any moment, even by kill -9, a search goes on with --resume: no finished trial is lost or
run again. On a Ray cluster, --out must be on a file system that all nodes see under the same path.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from kizzasi.cli.common import usable_device
from kizzasi.errors import SpecError, StudyError

if TYPE_CHECKING:
    from kizzasi.nas.study.config import SearchConfig

    Group: TypeAlias = argparse._ArgumentGroup


class Gene(argparse.Action):
    """One more gene: a name and its values."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        name, *texts = values
        numbers: tuple[float, ...] = ()
        try:
            numbers = tuple(int(t) if t.isdecimal() else float(t) for t in texts)
        except ValueError:
            parser.error(f"{option} {name}: {' '.join(texts):.60} are no numbers")
        setattr(
            namespace, self.dest, {**(getattr(namespace, self.dest, None) or {}), name: numbers}
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from kizzasi.nas.executors import KINDS
    from kizzasi.nas.study.config import SearchConfig

    default = SearchConfig()
    parser.add_argument("--data", help='a file or folder of bytes, or "stdlib"; default: built in')
    parser.add_argument("--test", metavar="FILE", help="a text of its own, read for the result")
    parser.add_argument("--config", metavar="FILE", help="settings as YAML; flags go before it")
    parser.add_argument("--out", default="runs/first", help="folder (default runs/first)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    parser.add_argument(
        "--warm",
        nargs="+",
        default=[],
        metavar="RUN",
        help="begin with what earlier searches of the same data found",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be trained and how long; no more"
    )
    where = parser.add_argument_group("where trials run")
    _add_where(where, KINDS)
    _add_strategy(parser.add_argument_group("how to search"), default)
    _add_bounds(parser.add_argument_group("what to search for"), default)
    _add_budgets(parser.add_argument_group("budgets"), default)


def _add_where(parser: Group, kinds: Sequence[str]) -> None:
    parser.add_argument("--workers", type=int, help="trials side by side (default: all there is)")
    parser.add_argument("--threads", type=int, help="of each worker (default: its share of cores)")
    parser.add_argument(
        "--executor",
        choices=kinds,
        help="where trials run (default: processes, or in-process with one worker or on CUDA)",
    )
    parser.add_argument(
        "--address", default="local", help='Ray cluster: "local" (default), "auto", "host:port"'
    )
    parser.add_argument(
        "--trial-seconds", type=float, metavar="S", help="stop and record a trial that takes longer"
    )
    parser.add_argument(
        "--trial-memory", type=float, metavar="MIB", help="stop and record one that takes more"
    )


def _add_strategy(parser: Group, default: SearchConfig) -> None:
    from kizzasi.nas.evaluators.zero_cost import PROXIES
    from kizzasi.nas.study.config import SCREENS, SchedulerName, SearcherName

    parser.add_argument(
        "--space",
        default=default.space,
        help='"hybrid" (default), "families", "tiny", "mamba_rwkv", "moe", or a YAML file',
    )
    parser.add_argument(
        "--searcher",
        choices=get_args(SearcherName),
        default=default.searcher,
        help=f"who proposes candidates ({default.searcher})",
    )
    parser.add_argument(
        "--scheduler",
        choices=get_args(SchedulerName),
        default=default.scheduler,
        help=f"who trains on ({default.scheduler})",
    )
    parser.add_argument(
        "--extrapolate",
        action="store_true",
        help="promote by what learning curves promise at the next rung (asha, stopping, hyperband)",
    )
    parser.add_argument(
        "--proxies",
        nargs="*",
        metavar="NAME",
        default=list(default.proxies),
        help=f"zero-cost scores to record ({' '.join(default.proxies)}), of {', '.join(PROXIES)}",
    )
    parser.add_argument(
        "--screens",
        nargs="*",
        metavar="NAME",
        default=list(default.screens),
        help="what chooses each proposal among a few draws, from cheap to dear (none), of "
        + ", ".join(SCREENS),
    )
    _add_numbers(
        parser,
        default,
        ("--screen-width", "screen_width", "draws that a screen chooses among"),
        ("--screen-tokens", "screen_tokens", "of training from the parent's weights, for inherit"),
        ("--population", "population", "members of an evolving population"),
        ("--sample", "sample", "contestants for a parent's place"),
    )
    parser.add_argument(
        "--side-by-side",
        type=int,
        metavar="N",
        help="trainings decided on together, which end before the next begin: workers wait, and "
        "their number does not change the result (default: no worker ever waits)",
    )
    parser.add_argument(
        "--mutation",
        type=float,
        default=default.mutation,
        help=f"chance per gene ({default.mutation})",
    )


def _add_bounds(parser: Group, default: SearchConfig) -> None:
    from kizzasi.nas.study.config import Precision

    parser.add_argument(
        "--optimizer",
        choices=("muon", "adamw"),
        default=default.optimizer,
        help=f"of every training ({default.optimizer})",
    )
    parser.add_argument(
        "--lrs",
        nargs="+",
        type=float,
        metavar="LR",
        help="learning rates of the sweeps (default: as suits the optimizer and --params)",
    )
    parser.add_argument(
        "--matrix-lrs",
        nargs="+",
        type=float,
        metavar="LR",
        help="learning rates of Muon's matrices, swept beside them (default: the same)",
    )
    parser.add_argument(
        "--gene",
        dest="genes",
        nargs="+",
        action=Gene,
        metavar="NAME VALUE",
        default={},
        help="a setting that candidates bring with them, and its values: lr, weight_decay, "
        "batch_size, dropout, ...; may be repeated",
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default=default.precision,
        help="of every forward pass (auto: bf16 on CUDA, fp32 elsewhere)",
    )
    parser.add_argument("--compile", action="store_true", help="train by torch.compile")
    parser.add_argument("--fused", action="store_true", help="AdamW in one kernel")
    _add_numbers(parser, default, ("--accumulate", "accumulate", "parts of a step's windows"))
    _add_numbers(parser, default, ("--params", "n_params", "parameter budget"))
    parser.add_argument(
        "--band", type=float, default=default.band, help=f"width of the band ({default.band})"
    )
    for flag, name, kind, text in (
        ("--max-state-bytes", "max_state_bytes", int, "bytes of the state, caches included"),
        ("--max-flops", "max_flops_per_token", float, "flops of a parallel pass per token"),
        ("--max-latency-ms", "max_latency_ms", float, "milliseconds of that pass, measured"),
        ("--max-memory-bytes", "max_memory_bytes", int, "peak bytes of that pass, measured"),
    ):
        parser.add_argument(flag, dest=name, type=kind, metavar="X", help=f"at most: {text}")
    _add_numbers(parser, default, ("--bounds-len", "bounds_len", "tokens of that pass"))


def _add_budgets(parser: Group, default: SearchConfig) -> None:
    _add_numbers(
        parser,
        default,
        ("--best", "n_best", "trained: the best by proxy"),
        ("--random", "n_random", "trained: a random control group"),
        ("--outside", "n_outside", "trained briefly: from outside the parameter band"),
        ("--search-tokens", "search_tokens", "no training on the rungs starts beyond that"),
        ("--finalists", "n_finalists", "searched candidates trained at the final budget"),
        ("--tokens", "final_tokens", "budget of the final training"),
        ("--final-seeds", "final_seeds", "final trainings of every finalist and of the preset"),
        ("--slope-seeds", "slope_seeds", "the same at about half of the parameters"),
        ("--seq-len", "seq_len", "training window in tokens"),
        ("--batch-size", "batch_size", "windows a step"),
        ("--score-windows", "score_windows", "held-out windows that a score uses"),
        ("--eta", "eta", "one in eta goes on, to eta times the tokens"),
    )
    parser.add_argument(
        "--candidates",
        dest="n_pool",
        type=int,
        metavar="N",
        help="candidates that a searcher proposes (16), or that the proxy scores (200)",
    )
    parser.add_argument(
        "--rungs",
        type=int,
        nargs="+",
        default=list(default.rungs),
        help=f"tokens at each rung ({' '.join(map(str, default.rungs))}); of asha, stopping, pasha "
        "and hyperband, the first and the last",
    )


def _add_numbers(parser: Group, default: SearchConfig, *options: tuple[str, str, str]) -> None:
    for flag, name, text in options:
        value = getattr(default, name)
        parser.add_argument(
            flag, dest=name, type=int, metavar="N", default=value, help=f"{text} ({value})"
        )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kizzasi.nas.executors import Limits
    from kizzasi.nas.report.pages import ending
    from kizzasi.nas.search import named_search

    args.device = usable_device(args.device)
    folder = Path(args.out)
    config, space = _wanted(args, folder)
    limits = Limits(args.trial_seconds, _bytes(args.trial_memory))
    limits.check(args.device)
    cores = os.cpu_count() or 1
    if args.device == "cpu" and (args.workers or 0) > cores:
        print(f"{args.workers} workers share {cores} cores; {cores} would do", file=sys.stderr)
    if args.dry_run:
        return _dry_run(config, space, args)
    found = named_search(
        config,
        folder,
        space,
        resume=args.resume,
        workers=args.workers,
        device=args.device,
        executor=args.executor,
        threads=args.threads,
        limits=limits,
        address=args.address,
        warm=args.warm,
    )
    best = found.best
    edge = found.summary.at_edge
    result = {
        **found.summary.result,
        "folder": str(folder),
        "best": str(folder / "best"),
        "metric": found.summary.metric.name,
        "name": best.name,
        "params": best.params,
        "score": best.score,
        "searched": best.searched,
    }
    warning = f"best model: {edge} (--lrs)\n\n" if edge else ""
    return result, warning + ending(found.summary, folder)


def _bytes(mebibytes: float | None) -> int | None:
    if mebibytes is None:
        return None
    if not 0 < mebibytes < 2**30:
        raise SpecError(f"--trial-memory {mebibytes:g}: give mebibytes, above 0")
    return round(mebibytes * 2**20)


def _wanted(args: argparse.Namespace, folder: Path) -> tuple[SearchConfig, Any]:
    """The config and, where the journal alone has it, the space. A resumed run takes from its
    journal what no flag says."""
    from kizzasi.nas.study.config import SearchConfig
    from kizzasi.nas.study.config_file import read_config, require_read
    from kizzasi.nas.study.identity import settings_of

    names = SearchConfig().to_dict().keys() & vars(args).keys()
    given = {name: args.given[name] for name in names & args.given.keys()}
    told = settings_of(folder / "journal.jsonl") if args.resume else None
    if args.resume and told is None:
        if not given and args.config is None:
            raise StudyError(f"{folder}: holds no search; nothing to resume")
        print(f"{folder}: holds no search yet; a new one begins", file=sys.stderr)
    base: dict[str, Any] = {name: getattr(args, name) for name in names}
    if args.config is not None:
        base = read_config(args.config)[0].to_dict()
    elif told is not None:
        base = told.config
    config = SearchConfig.from_dict({**base, **given})
    config.check()
    require_read(config, given)
    return config, None if told is None or "space" in given else told.space


def _dry_run(
    config: SearchConfig, space: Any, args: argparse.Namespace
) -> tuple[dict[str, Any], str]:
    """What a search would do, by its own arithmetic and the pace of a few steps here."""
    from kizzasi.nas.study.outline import outline

    told = outline(config, space, device=args.device, workers=args.workers)
    minutes = told["seconds"] / 60
    text = (
        f"at most {told['trials']:,} trainings of {told['candidates']:,} candidates and "
        f"{told['baselines']} baselines, {told['tokens']:,} tokens\n"
        f"at most {minutes:,.1f} minutes at {told['tokens_per_second']:,.0f} tokens a second by "
        f"{told['workers']} workers, measured on a model of {told['params']:,} parameters\n"
        "nothing was written"
    )
    return told, text
