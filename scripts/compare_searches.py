"""Compare the winners of two finished searches, and each run's best preset, over common seeds.

The second run is usually the control: the same search with `--searcher random`. A difference is
given with its 95 % interval (paired over the seeds of the final trainings, Student's t), then what
every proxy was worth in the second run.

    python scripts/compare_searches.py runs/hybrid runs/control [--json]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from kizzasi.errors import StudyError
from kizzasi.nas.report.pages import summarise
from kizzasi.nas.results.finals import Final
from kizzasi.nas.results.noise import t_quantile
from kizzasi.nas.results.summary import Summary
from kizzasi.nas.study.journal import read_events


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("control", type=Path)
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    arguments = parser.parse_args()
    run, control = (read(folder) for folder in (arguments.run, arguments.control))
    found = compare(run, control)
    if arguments.json:
        print(json.dumps(found))
        return
    for name, final in found["finals"].items():
        print(f"{name:16} {final['candidate']:40} {final['params']:>9,} {final['score']}")
    for name, gap in found["gaps"].items():
        print(f"{name:32} {gap['mean']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}] bits/byte")
    for name, worth in found["proxies"].items():
        print(f"{name:12} Kendall tau-b in the band: {worth}")


class Run(NamedTuple):
    """A finished search."""

    summary: Summary
    winner: Final
    preset: Final


def read(folder: Path) -> Run:
    """Raises StudyError if the search is not finished."""
    summary = summarise(read_events(folder / "journal.jsonl"))
    if summary.winner is None or summary.preset is None:
        raise StudyError(f"{folder}: has no winner and preset yet; finish it with --resume")
    return Run(summary, summary.winner, summary.preset)


def compare(run: Run, control: Run) -> dict[str, Any]:
    """Finals, and differences (below 0: the first is better)."""
    if run.summary.study["corpus"]["digest"] != control.summary.study["corpus"]["digest"]:
        raise StudyError("the two searches were scored on different bytes; compare like with like")
    finals = {
        "winner": run.winner,
        "best preset": run.preset,
        "control's winner": control.winner,
    }
    return {
        "finals": {
            name: {
                "candidate": final.entry["name"],
                "params": final.entry["params"],
                "tokens": final.tokens,
                "score": str(final),
            }
            for name, final in finals.items()
        },
        "gaps": {
            "winner - best preset": gap(run.winner, run.preset),
            "winner - control's winner": gap(run.winner, control.winner),
            "control's winner - best preset": gap(control.winner, run.preset),
        },
        "proxies": {
            name: str(worth.in_band.proxy.kendall_tau_b)
            for name, worth in control.summary.agreements.items()
        },
    }


def gap(a: Final, b: Final) -> dict[str, float]:
    """Mean of a - b over the seeds that both finished, and its 95 % interval."""
    gaps = [a.by_seed[seed] - b.by_seed[seed] for seed in a.by_seed if seed in b.by_seed]
    if len(gaps) < 2:
        raise StudyError("one seed has no interval; search with --final-seeds 2 or more")
    half = t_quantile(0.975, len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    mean = statistics.fmean(gaps)
    return {"mean": mean, "low": mean - half, "high": mean + half}


if __name__ == "__main__":
    main()
