"""The tables of a report, as rows of cells: Markdown, HTML and the terminal show the same ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kizzasi.nas.report.figures import COSTS, trainings
from kizzasi.nas.report.layers import layer_rows
from kizzasi.nas.report.svg import short
from kizzasi.nas.results.equal_terms import CLOSE, InTime, equal_params, equal_time
from kizzasi.nas.results.finals import Final
from kizzasi.nas.results.noise import TOO_FEW, against, noise_of
from kizzasi.nas.results.rank_agreement import Agreement, Region
from kizzasi.nas.results.summary import Standing, Summary
from kizzasi.nas.results.words import said
from kizzasi.nas.searchers.nsga2 import pareto_front

LEFT_ALIGNED = {
    "architecture", "group", "best", "family", "predictor", "candidate", "reason", "setting",
    "value", "baseline", "scores by setting", "settings", "chosen", "scores by seed",
    "against the best",
    "against the steepest", "on the front of", "layer", "mixer", "channel", "curve", "where",
}  # fmt: skip
BARS = "▁▂▃▄▅▆▇█"
CURVES = 20  # trainings listed
CURVE_POINTS = 32
Rows = list[list[str]]
EQUAL_TOKENS = (
    "Everyone trained from scratch on the same tokens. This table decides the search; those of "
    "parameters, time and size do not."
)
EQUAL_PARAMS = (
    "At the size of the best preset, or of the winner if there is none. A finalist with a slope "
    "is moved along it from its own size, over the seeds of both sizes; without one it stands as "
    f"it is if it is within {CLOSE:.0%} of the size, and is else not compared."
)
EQUAL_TIME = (
    "After the seconds that the fastest finalist trained for on this machine; another machine "
    "gives another table. Tokens: by the fastest seed, as other work only slows a training down. "
    "Interpolated: the held-out score after all tokens, and what the training loss still lost from "
    "there to the end, by a straight line through it over log tokens (from half of all tokens at "
    "the latest). The error of that, at 95 %, is added to the noise floor. It is read in "
    "mid-schedule, before the learning rate has come down."
)
NAMES = (
    "A name has the width (d64: d_model 64), the layers or the family, and where several designs "
    "have one name, the first letters of their digest. Proxy: a score without training."
)
TWO_SIZES = (
    "The same layers with fewer channels, on the same tokens at the same learning rate. Slope: "
    "what each doubling of the parameters adds to the score. Double size is "
    "extrapolated along it from two sizes, not measured."
)


@dataclass(frozen=True)
class Part:
    """A table of the report.

    Args:
        title: its heading.
        rows: the first one holds the names of the columns.
        missing: what is said if there is no other row.
        small: takes half of the page.
        plotted: the page shows it as a plot instead.
        marked: the row to stand out, counted without the names.
        note: how its figures came about, for those that one does not simply measure.
    """

    title: str
    rows: Rows
    missing: str
    small: bool = False
    plotted: bool = False
    marked: int | None = None
    note: str = ""


def tables(summary: Summary) -> list[Part]:
    """Every table of the report, candidates first."""
    ids = [standing.entry["id"] for standing in summary.standings]
    won = ids.index(summary.winner.entry["id"]) if summary.winner else None
    return [
        Part(
            "Candidates",
            _candidates(summary),
            "No candidate is there yet.",
            marked=won,
            note=NAMES,
        ),
        *finalist_tables(summary),
        Part("Pareto fronts", _fronts(summary), "No candidate has a score yet."),
        Part("Layers", layer_table(summary), "No candidate may win yet.", plotted=True),
        Part("Rungs", rung_rows(summary), "No trial has ended yet."),
        Part("Learning curves", _curves(summary), "No training has a loss yet.", plotted=True),
        Part(
            "What the proxy was worth",
            _agreements(summary),
            "No candidate with a proxy is trained.",
        ),
        Part(
            "Baselines on the held-out data",
            _baselines(summary),
            "Not yet measured.",
            True,
            note=str(summary.data.get("looked_at", "")),
        ),
        Part("Learning rates", _sweeps(summary), "No sweep has ended yet.", True),
        Part("Estimated over real parameters", _estimates(summary), "No candidate is there.", True),
        Part("Failures", _failures(summary), "No trial failed."),
        Part("Settings and data", _settings(summary), "Not yet written."),
    ]


def column_names(summary: Summary) -> list[str]:
    """Of the table of candidates."""
    first = ["rank", "architecture", "group", "params", "proxy", "tokens"]
    return [*first, summary.unit, "tok/s", "state 1k"]


def cells(summary: Summary, standing: Standing) -> list[str]:
    """A candidate under `column_names`."""
    entry, scored = standing.entry, standing.scored
    speed, proxy = standing.tokens_per_second, entry.get("proxy")
    return [
        "-" if standing.rank is None else str(standing.rank),
        entry["name"],
        entry["group"],
        f"{entry['params']:,}",
        "-" if proxy is None else f"{proxy:.3f}",
        short(scored["tokens"]) if scored else "-",
        summary.show(scored["score"]) if scored else "failed" if standing.trials else "waiting",
        "-" if speed is None else short(speed),
        f"{short(entry['state_bytes'])}B",
    ]


def _candidates(summary: Summary) -> Rows:
    estimates = (s.entry.get("estimated_params") for s in summary.standings)
    listed = ["-" if estimate is None else f"{estimate:,}" for estimate in estimates]
    rows = [column_names(summary), *(cells(summary, s) for s in summary.standings)]
    whole = [r[:4] + [e] + r[4:] for r, e in zip(rows, ["estimated", *listed], strict=True)]
    told = [len(whole) == 1 or set(column[1:]) != {"-"} for column in zip(*whole, strict=True)]
    return [[cell for cell, kept in zip(row, told, strict=True) if kept] for row in whole]


def finalist_tables(summary: Summary) -> list[Part]:
    """The finalists after equal tokens, at equal parameters, after equal time, at two sizes."""
    none = "Final training has not begun yet."
    two = "No finalist was trained at a second size; --slope-seeds does that."
    return [
        Part("Finalists, token-matched", finalist_rows(summary), none, note=EQUAL_TOKENS),
        Part("Finalists, parameter-matched", param_rows(summary), none, note=EQUAL_PARAMS),
        Part("Finalists, time-matched", time_rows(summary), none, note=EQUAL_TIME),
        Part("Finalists at two sizes", size_rows(summary), two, note=TWO_SIZES),
    ]


def finalist_rows(summary: Summary) -> Rows:
    """Every finalist: its seeds, and whether the noise floor lets it be told from the best."""
    names = ["architecture", "group", "params", "tokens", summary.unit, "scores by seed"]
    rows = []
    for final in summary.finals:
        entry = final.entry
        won = summary.winner is not None and entry["id"] == summary.winner.entry["id"]
        scores = {t["seed"]: t["score"] for t in final.trials}
        listed = (
            f"{seed}: {'failed' if s is None else summary.show(s)}" for seed, s in scores.items()
        )
        sizes = [f"{entry['params']:,}", f"{final.tokens:,}", _bits(summary, final)]
        group = "winner" if won else entry["group"]
        verdict = against(summary.finals[0], final, summary.noise)
        rows.append([entry["name"], group, *sizes, ", ".join(listed), verdict])
    return [[*names, "against the best"], *rows]


def param_rows(summary: Summary) -> Rows:
    """Every finalist as it would be at the size of the reference."""
    rows: Rows = []
    if reference := summary.reference:
        size = reference.entry["params"]
        moved = equal_params(summary.finals, summary.sized, size)
        for final, verdict in verdicts(moved):
            own = final.entry["params"]
            off = f"{own / size - 1:+.1%}"
            if final.mean is None:
                verdict = "not compared"
            rows.append([final.entry["name"], f"{own:,}", off, _bits(summary, final, "-"), verdict])
    names = ["architecture", "params", "off the size", f"{summary.unit} at the size"]
    return [[*names, "against the best"], *rows]


def verdicts(finals: Sequence[Final]) -> list[tuple[Final, str]]:
    """Finalists by their mean, and where each stands beside the best."""
    ranked = sorted(finals, key=lambda f: math.inf if f.mean is None else f.mean)
    noise = noise_of(ranked)
    return [(final, against(ranked[0], final, noise)) for final in ranked]


def time_rows(summary: Summary) -> Rows:
    """Every finalist after the training time of the fastest."""
    rows = []
    ranked = equal_time(summary.finals) if summary.metric.of_loss else []
    for row in ranked:
        speeds = " .. ".join(dict.fromkeys(short(v) for v in (min(row.speeds), max(row.speeds))))
        read = ["-", "-"] if row.mean is None else [summary.show(row.mean), f"{row.error:.3f}"]
        own = [row.final.entry["name"], speeds, f"{row.tokens:,}", *read]
        rows.append([*own, timed_verdict(summary, ranked[0], row)])
    names = [
        "architecture",
        "tok/s",
        "tokens in that time",
        f"{summary.unit} then",
        "reading error",
    ]
    return [[*names, "against the best"], *rows]


def timed_verdict(summary: Summary, best: InTime, row: InTime) -> str:
    """As `against`, but the errors of reading both curves are added to the noise floor."""
    if row.mean is None or best.mean is None:
        return "the curve is too short"
    if row is best:
        return "best mean"
    if summary.noise is None:
        return TOO_FEW
    gap = row.mean - best.mean
    margin = summary.noise.floor + best.error + row.error
    return f"{gap:+.3f}, {'tied' if gap <= margin else 'worse'}"


def size_rows(summary: Summary) -> Rows:
    """Every finalist that was to be trained at a second size, the steepest slope first."""
    names = ["architecture", "params", "twin", f"{summary.unit}, twin", "slope per doubling"]
    rows: Rows = []
    pairs = {pair.final.entry["id"]: pair for pair in summary.sized}
    doubled = {f.entry["id"]: (f, v) for f, v in verdicts([p.doubled for p in pairs.values()])}
    for slope, verdict in verdicts([pair.slope for pair in pairs.values()]):
        entry, twin = slope.entry, pairs[slope.entry["id"]].twin
        sizes = [f"{entry['params']:,}", f"{twin.entry['params']:,}", _bits(summary, twin)]
        double, place = doubled[entry["id"]]
        steepest = "steepest" if verdict == "best mean" else verdict.replace("worse", "flatter")
        rows.append(
            [entry["name"], *sizes, _bits(summary, slope), steepest, _bits(summary, double), place]
        )
    for own, twin in summary.twins.items():
        if own not in pairs:
            entry = next(e for e in summary.entries if e["id"] == own)
            size, done = twin.entry["params"], "failed" if twin.trials else "waiting"
            said = twin.entry["refusal"] or done
            shown = "-" if size is None else f"{size:,}"
            rows.append([entry["name"], f"{entry['params']:,}", shown, "-", "-", said, "-", "-"])
    more = ["against the steepest", f"{summary.unit}, double size", "against the best"]
    return [[*names, *more], *rows]


def _bits(summary: Summary, final: Final, missing: str = "failed") -> str:
    return missing if final.mean is None else summary.numbers(final)


def _fronts(summary: Summary) -> Rows:
    """Who is on a front of the deepest rung, and on which."""
    rungs = summary.rungs
    reached = [s for s in summary.standings if rungs and s.score(rungs[-1].name) is not None]
    fronts: dict[str, list[str]] = {}
    for key, name, _ in COSTS:
        points = {
            s.entry["id"]: (s.entry[key], score)
            for s in reached
            if s.entry.get(key) is not None and (score := s.score(rungs[-1].name)) is not None
        }
        names = list(points)
        for place in pareto_front(list(points.values())) if points else ():
            fronts.setdefault(names[place], []).append(name)
    rows = []
    for standing in reached:
        entry = standing.entry
        if entry["id"] in fronts:
            latency = entry.get("latency_ms")
            costs = [f"{entry['params']:,}", f"{entry['state_bytes']:,}"]
            costs.append("-" if latency is None else f"{latency:.2f}")
            reached_score = standing.score(rungs[-1].name)
            score = "-" if reached_score is None else summary.show(reached_score)
            rows.append([entry["name"], score, *costs, ", ".join(fronts[entry["id"]])])
    names = ["architecture", summary.unit, "params", "state bytes", "latency, ms"]
    return [[*names, "on the front of"], *rows]


def layer_table(summary: Summary) -> Rows:
    """The layers of the winner, or else of the leader so far."""
    rows = layer_rows(summary.leader["spec"]) if summary.leader else []
    return [["layer", "mixer", "channel"], *(row + ["-"] * (3 - len(row)) for row in rows)]


def rung_rows(summary: Summary) -> Rows:
    """Every rung that candidates climbed."""
    rows = [
        [
            rung.name,
            f"{rung.tokens:,}",
            str(rung.trained),
            str(rung.failed),
            "-" if rung.best is None else summary.show(rung.best),
            rung.best_name,
            f"{rung.seconds:.0f}",
        ]
        for rung in summary.rungs
    ]
    return [["rung", "tokens", "trained", "failed", summary.unit, "best", "seconds"], *rows]


def _curves(summary: Summary) -> Rows:
    """The finalists' trainings, then those of the best candidates."""
    rows = []
    for entry, trial in trainings(summary)[:CURVES]:
        bits = [loss for _, loss in trial["curve"] if loss is not None]
        if bits:
            ends = [f"{trial['tokens']:,}", f"{bits[0]:.3f}", f"{bits[-1]:.3f}"]
            rows.append(
                [entry["name"], said(trial["settings"]), str(trial["seed"]), *ends, spark(bits)]
            )
    return [["architecture", "settings", "seed", "tokens", "first", "last", "curve"], *rows]


def spark(values: list[float]) -> str:
    """A curve as one line of text, between its own least and greatest value."""
    step = max(1, -(-len(values) // CURVE_POINTS))
    shown = values[::step]
    low, high = min(shown), max(shown)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in shown)


def _agreements(summary: Summary) -> Rows:
    names = ["Spearman", "Kendall tau-b", "top-k recall"]
    agreements = summary.agreements
    if not agreements:
        return [names]
    k = next(iter(agreements.values())).k
    rows = _region("in the band", {name: w.in_band for name, w in agreements.items()})
    rows += _region("all", {name: w.everywhere for name, w in agreements.items()})
    head = ["predictor", "candidates", *names[:2], f"top-{k} recall", "tau-b above parameters"]
    return [head, *rows]


def _region(place: str, regions: dict[str, Region]) -> Rows:
    """Proxies, then what they have to beat, over the candidates of the most complete one."""
    rows = [
        _agreement(f"{name}, {place}", region.n, region.proxy, str(region.lead))
        for name, region in regions.items()
    ]
    widest = max(regions.values(), key=lambda region: region.n)
    rows.append(_agreement(f"parameters only, {place}", widest.n, widest.parameters, "-"))
    return [*rows, _agreement(f"random, {place}", widest.n, widest.random, "-")]


def _agreement(name: str, n: int, a: Agreement, lead: str) -> list[str]:
    return [name, str(n), str(a.spearman), str(a.kendall_tau_b), str(a.top_k_recall), lead]


def _baselines(summary: Summary) -> Rows:
    baselines: dict[str, float] = summary.study.get("baselines", {})
    rows = [[name, f"{value:.3f}"] for name, value in baselines.items()]
    return [["baseline", summary.unit], *rows]


def _sweeps(summary: Summary) -> Rows:
    rows = []
    for sweep in summary.sweeps:
        scores = sweep["scores"].items()
        listed = ", ".join(f"{lr}: {'failed' if s is None else f'{s:.3f}'}" for lr, s in scores)
        rows.append([sweep["family"], said(sweep["settings"]), listed])
    return [["family", "chosen", "scores by setting"], *rows]


def _estimates(summary: Summary) -> Rows:
    ratios = summary.estimate_ratios.items()
    rows = [[family, str(n), f"{ratio:.2f}"] for family, (ratio, n) in ratios]
    return [["family", "candidates", "median ratio"], *rows]


def _failures(summary: Summary) -> Rows:
    rows = [
        [name, trial["rung"], said(trial["settings"]), str(trial["seed"]), why.strip()]
        for name, trial, why in summary.failures
    ]
    return [["candidate", "rung", "settings", "seed", "reason"], *rows]


def _settings(summary: Summary) -> Rows:
    named = (("data", "data"), ("config", ""), ("versions", "version of"))
    pairs = [
        (f"{prefix} {name}".strip(), str(value))
        for key, prefix in named
        for name, value in summary.study.get(key, {}).items()
    ]
    return [["setting", "value"], *map(list, pairs)]
