"""The next jobs of a search whose trainings happen elsewhere, as JSON lines.

example:
  kizzasi ask runs/mine --config search.yaml --metric loss --n 4    # begins it
  kizzasi ask runs/mine                                             # later: what is still to do
  kizzasi tell runs/mine < results.jsonl

A job has an id, a spec, a budget (train it up to there, on from what was left at its checkpoint, a
path of its own), a horizon (the budget it would end with), a seed and settings. All state is the
folder's journal: asking again gives the same jobs until they are told. When there are no more, the
one line that comes says what was found.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kizzasi.errors import SpecError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="folder of the search")
    parser.add_argument("--config", metavar="FILE", help="settings as YAML, as in search --config")
    parser.add_argument("--metric", metavar="NAME", help="of the scores that will be told")
    parser.add_argument("--higher", action="store_true", help="a higher score is better")
    parser.add_argument("--vocab-size", type=int, default=256, help="of the models (256)")
    parser.add_argument("--n", type=int, help="jobs side by side (default: as before, or 1)")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kizzasi.nas.elsewhere import ask, begun, plan_elsewhere, plan_in
    from kizzasi.nas.report.found import Found
    from kizzasi.nas.study.config_file import read_config
    from kizzasi.train.task import Metric

    folder = Path(args.run)
    if args.config is not None:
        if args.metric is None:
            raise SpecError("--metric: say what the scores are, such as --metric loss")
        metric = Metric(args.metric, lower_is_better=not args.higher)
        plan = plan_elsewhere(read_config(args.config)[0], metric, args.vocab_size)
    elif begun(folder):
        plan = plan_in(folder)
    else:
        raise SpecError(f"{folder}: holds no search yet; give --config FILE and --metric NAME")
    found = ask(plan, folder, args.n)
    if not isinstance(found, Found):
        return {"jobs": found}, "\n".join(map(json.dumps, found))
    best = found.best
    told = {"finished": True, "name": best.name, "score": best.score, "spec": best.spec.to_dict()}
    return told, json.dumps(told)
