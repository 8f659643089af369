"""`search_report.json`: a search of pipelines under EvoForge's keys, in valid JSON.

Losses are in nats per token and held out, at the start as at the end; a training step counts as
three forward passes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kizzasi.models import ModelSpec
from kizzasi.nas.pipelines.printing import to_pipeline
from kizzasi.nas.pipelines.writing import said
from kizzasi.nas.results.summary import Standing, Summary

FORWARD_AND_BACK = 3


def search_report(summary: Summary, tokens_per_step: int, seq_len: int, n_breadth: int) -> Any:
    """The report as plain data.

    Args:
        summary: of the run.
        tokens_per_step: of its recipe.
        seq_len: window that flops are counted for.
        n_breadth: rungs of the breadth; later ones are the depth.
    """
    standings = [s for s in summary.standings if s.trials]
    history = [
        _trial(standing, trial, tokens_per_step, seq_len)
        for standing in standings
        for trial in standing.trials
        if trial["rung"].isdigit() and int(trial["rung"]) < n_breadth
    ]
    scored = [row["score"] for row in history if row.get("score") is not None]
    deep = [
        _trial(standing, trial, tokens_per_step, seq_len)
        for standing in standings
        for trial in standing.trials
        if trial["rung"].isdigit() and int(trial["rung"]) >= n_breadth
    ]
    top = str(n_breadth - 1)
    asha = {
        "evaluated": len(standings),
        "promoted": sum(s.tried("1") for s in standings) if n_breadth > 1 else 0,
        "survivors": sum(s.score(top) is not None for s in standings),
        "best_score": min(scored, default=None),
        "history": history,
    }
    candidates = [
        _candidate(i, standing, tokens_per_step, seq_len) for i, standing in enumerate(standings)
    ]
    report = {"metric": summary.metric.name, "asha": asha, "candidates": candidates}
    return _finite({**report, "deep_evaluations": deep})


def write_search_report(folder: Path, report: Any) -> Path:
    """Write it into a run's folder."""
    path = folder / "search_report.json"
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", "utf-8")
    return path


def _trial(standing: Standing, trial: Mapping[str, Any], per_step: int, seq_len: int) -> Any:
    spec = ModelSpec.from_dict(standing.entry["spec"])
    flops = flops_of(spec, trial["tokens"], seq_len)
    start, end = _losses(standing, trial)
    found = {
        "cfg_path": standing.entry["id"],
        "name": standing.entry["name"],
        "steps": trial["tokens"] // per_step,
        "score": trial["score"],
        "tokens": trial["tokens"],
        "flops": flops,
        "loss_start": start,
        "loss_final": end,
        "qpc": qpc(start, end, flops),
    }
    if trial["failure"]:
        return {**found, "error": trial["failure"]}
    return {**found, "metrics": (trial.get("facts") or {}).get("end", {})}


def _candidate(i: int, standing: Standing, per_step: int, seq_len: int) -> Any:
    spec = ModelSpec.from_dict(standing.entry["spec"])
    rungs = [trial for trial in standing.trials if trial["rung"].isdigit()]
    scored = [trial for trial in rungs if trial["score"] is not None]
    last = scored[-1] if scored else None
    tokens = max((trial["tokens"] for trial in rungs), default=0)
    flops = flops_of(spec, tokens, seq_len)
    start, end = (None, None) if last is None else _losses(standing, last)
    best = min(scored, key=lambda trial: trial["score"], default=None)
    facts = {} if last is None else (last.get("facts") or {}).get("end", {})
    return {
        "candidate_index": i,
        "id": standing.entry["id"],
        "name": standing.entry["name"],
        "params": standing.entry["params"],
        "stages": len(rungs),
        "best_score": best and best["score"],
        "best_steps": best and best["tokens"] // per_step,
        "qpc": qpc(start, end, flops),
        "tokens_per_sec": standing.tokens_per_second,
        "total_tokens": tokens,
        "total_flops": flops,
        "metrics": {**facts, "loss_start": start, "loss_final": end},
        "architecture": said(to_pipeline(spec).document)["arch"],
    }


def _losses(standing: Standing, trial: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Held out, before the first step and at a trial's budget."""
    facts = [(t.get("facts") or {}) for t in standing.trials]
    start = next((f["start"]["loss"] for f in facts if "start" in f), None)
    end = (trial.get("facts") or {}).get("end", {}).get("loss")
    return start, end


def flops_of(spec: ModelSpec, tokens: int, seq_len: int) -> int:
    """Of a training over so many tokens."""
    return FORWARD_AND_BACK * round(spec.training_flops(seq_len) / seq_len * tokens)


def qpc(start: float | None, end: float | None, flops: int) -> float | None:
    """Quality per compute: by how much the held-out loss fell, per flop."""
    return (start - end) / flops if start is not None and end is not None and flops else None


def _finite(value: Any) -> Any:
    """JSON has no infinities; what is none is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value
