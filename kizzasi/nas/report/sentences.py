"""What a run found, in words: progress, the winner's duel, ties, proxies' worth, caveats."""

from __future__ import annotations

import math
import statistics

from kizzasi.nas.report.figures import COSTS
from kizzasi.nas.report.svg import short
from kizzasi.nas.report.tables import timed_verdict, verdicts
from kizzasi.nas.results.equal_terms import CLOSE, DISTURBED, equal_params, equal_time, turns
from kizzasi.nas.results.finals import Final
from kizzasi.nas.results.foresight import foresight
from kizzasi.nas.results.hypervolume import covered
from kizzasi.nas.results.noise import Noise, noise_of
from kizzasi.nas.results.summary import ANALYTIC, Summary


def conclusions(summary: Summary) -> list[str]:
    """Every finding as a sentence or two; what is not known yet is left out."""
    said = (
        _progress,
        _refused,
        _screened,
        _duel,
        _decided_on,
        _ties,
        _at_equal_params,
        _at_equal_time,
        _slopes,
        _double_size,
        _no_twins,
        _against_baselines,
        _fronts,
        _control,
        _proxy,
        _further_proxies,
        _foresight,
        _estimates,
        _repeated,
    )
    return [text for text in (say(summary) for say in said) if text]


def verdict(summary: Summary) -> str:
    """The one thing to know, in one sentence."""
    winner, preset = summary.winner, summary.preset
    if not summary.finished:
        return _progress(summary)
    if winner is None:
        return "The search is complete, and nothing that it trained has a score."
    name, size = winner.entry["name"], winner.entry["params"]
    said = f"The best searched model is {name} ({size:,} parameters) at {summary.say(winner)}"
    if preset is None:
        return f"{said}; there is no preset to compare it with."
    kept = ""
    if summary.saved and summary.saved.entry["group"] == "preset":
        better = winner.mean is not None and preset.mean is not None and winner.mean < preset.mean
        why = "better on the data that decide" if better else "the better one"
        kept = f"; the preset, {why}, is what was saved"
    return f"{said}, {_beside(winner, preset, summary)}{_settings(summary)}{kept}."


def _settings(summary: Summary) -> str:
    """Where a finalist of the preset's own architecture is better, the lead is not all due to the
    architecture: as an addition to a sentence."""
    preset, winner = summary.preset, summary.winner
    if preset is None or preset.mean is None:
        return ""
    for final in summary.finals:
        entry, mean = final.entry, final.mean
        same = entry["group"] != "preset" and entry["spec"] == preset.entry["spec"]
        if same and mean is not None and mean < preset.mean:
            if final is winner:
                return "; it is that preset's architecture at other settings"
            said = f"that preset's architecture at other settings, {entry['name']}, stands at"
            return f"; {said} {summary.show(mean)} {summary.unit}"
    return ""


def _beside(winner: Final, preset: Final, summary: Summary) -> str:
    """The winner's place beside the best preset, as the end of a sentence."""
    name, noise, unit = preset.entry["name"], summary.noise, summary.unit
    w, p = winner.mean, preset.mean
    if w is None or p is None:
        return f"and cannot be compared with the best preset, {name}: one of the two failed"
    place, gap = "ahead of" if w < p else "behind", f"{abs(p - w):.3f} {unit}"
    if noise is None:
        return f"{place} the best preset, {name}, by {gap}, which one seed does not tell from noise"
    if noise.tied(winner, preset):
        return f"a tie with the best preset, {name}: {gap} apart, within the noise floor of {noise}"
    return f"{place} the best preset, {name}, by {gap}, more than the noise floor of {noise}"


def _fronts(summary: Summary) -> str:
    found = [(name, both) for key, name, _ in COSTS if (both := covered(summary, key))]
    told = [f"{name} {both.searched:.2f} and {both.presets:.2f}" for name, both in found]
    said = "Shares of the box of score and cost that the searched front and the presets' dominate"
    return f"{said}: {', '.join(told)}." if told else ""


def _foresight(summary: Summary) -> str:
    found = foresight([standing.trials for standing in summary.standings])
    said = "; ".join(map(str, found))
    return f"{said[0].upper()}{said[1:]}." if said else ""


def _progress(summary: Summary) -> str:
    state = "complete" if summary.finished else "not complete; --resume continues one that stopped"
    failed = len(summary.failures)
    first = ""
    if summary.saved and summary.saved.entry["group"] == "preset":
        first = f"A preset is best, {summary.saved.entry['name']}: no searched model beats it. "
    return (
        f"{first}The search is {state}: {len(summary.standings)} candidates, "
        f"{len(summary.trials)} trials, {failed or 'none'} of them failed."
    )


def _refused(summary: Summary) -> str:
    listed = ", ".join(f"{rule} {n}" for rule, n in summary.refused.items())
    return f"Refused before any training, by rule: {listed}." if listed else ""


def _screened(summary: Summary) -> str:
    if not summary.screened:
        return ""
    listed = ", ".join(
        f"{by} {n}{f' on {tokens:,} tokens in all' if tokens else ''}"
        for by, (n, tokens) in summary.screened.items()
    )
    return f"Screens judged draws before any training from scratch: {listed}."


def _duel(summary: Summary) -> str:
    winner, preset = summary.winner, summary.preset
    if winner is None:
        return "No winner has been trained at the final budget yet."
    said = (
        f"Trained anew on {winner.tokens:,} tokens, the winner {winner.entry['name']} "
        f"({winner.entry['params']:,} parameters) reaches {summary.say(winner)}"
    )
    if preset is None:
        return f"{said}; there is no preset to compare it with."
    return (
        f"{said}; the best preset, {preset.entry['name']} ({preset.entry['params']:,} "
        f"parameters), on {preset.tokens:,} tokens: {summary.say(preset)}. "
        f"{_outcome(winner, preset, summary.noise, summary.unit)}."
    )


def _outcome(winner: Final, preset: Final, noise: Noise | None, unit: str) -> str:
    """A difference is one only if it is above the noise floor."""
    w, p = winner.mean, preset.mean
    if w is None or p is None:
        return "One of the two has failed, so they cannot be compared"
    if noise is None:
        place = "ahead" if w < p else "behind"
        return (
            f"The winner is {place} by {abs(p - w):.3f} {unit}; without two seeds that both "
            "finished nothing tells that from noise"
        )
    gap = noise.gap(winner, preset)
    if noise.tied(winner, preset):
        return f"This is a tie: {abs(gap):.3f} {unit} are within the noise floor of {noise}"
    verb = "beats" if gap > 0 else "loses to"
    return (
        f"The winner {verb} the preset by {abs(gap):.3f} {unit}, more than the noise floor "
        f"of {noise}"
    )


def _decided_on(summary: Summary) -> str:
    """Which data the scores are on."""
    if not any(final.scores for final in summary.finals):
        return ""
    if any(final.tests for final in summary.finals):
        return "Final scores are on test data, which decided nothing and were read once."
    return (
        "Final scores are on the data that also chose architecture and settings, and so a little "
        "better than on data that nobody has looked at."
    )


def _ties(summary: Summary) -> str:
    """Only where there is more to say than the duel says."""
    scored = [final for final in summary.finals if final.scores]
    if summary.noise is None or len(scored) < 3:
        return ""
    best, *others = scored
    tied = [f.entry["name"] for f in others if summary.noise.tied(best, f)]
    said = f"Of {len(others) + 1} finalists {best.entry['name']} has the best mean"
    if not tied:
        return f"{said}; every other is worse by more than the noise floor of {summary.noise}."
    return f"{said}; within the noise floor of {summary.noise}, and so tied: {', '.join(tied)}."


def _at_equal_params(summary: Summary) -> str:
    """Left out where nobody but the reference can be compared, and no one asked for slopes."""
    if summary.reference is None:
        return ""
    size = summary.reference.entry["params"]
    ranked = verdicts(equal_params(summary.finals, summary.sized, size))
    compared = [(f, verdict) for f, verdict in ranked if f.mean is not None]
    if len(compared) < 2:
        return ""
    listed = ", ".join(
        f"{f.entry['name']} {summary.show(f.mean or 0.0)} ({verdict})" for f, verdict in compared
    )
    left = [f.entry["name"] for f, _ in ranked if f.mean is None]
    said = f"At the {size:,} parameters of {summary.reference.entry['name']}: {listed}"
    if not left:
        return f"{said}."
    return f"{said}; not compared, without a slope or within {CLOSE:.0%}: {', '.join(left)}."


def _at_equal_time(summary: Summary) -> str:
    ranked = equal_time(summary.finals) if summary.metric.of_loss else []
    if len(ranked) < 2:
        return ""
    fastest = max(ranked, key=lambda row: row.speeds[0])
    seconds = fastest.tokens / fastest.speeds[0]
    listed = ", ".join(
        f"{row.final.entry['name']} {'unknown' if row.mean is None else summary.show(row.mean)} "
        f"({timed_verdict(summary, ranked[0], row)})"
        for row in ranked
    )
    said = (
        f"After {short(seconds)} s of training, the time of the fastest, "
        f"{fastest.final.entry['name']}: {listed}. Interpolated on training losses, and only for "
        "this machine; it decides nothing."
    )
    worst = max(row.speeds[0] / row.speeds[-1] for row in ranked)
    if worst > DISTURBED:
        said += f" Seeds of one finalist differed {worst:.1f} times in speed: take it with care."
    return said


def _slopes(summary: Summary) -> str:
    ranked = verdicts([pair.slope for pair in summary.sized])
    if not ranked:
        return ""
    listed = ", ".join(f"{f.entry['name']} {_signed(f)}" for f, _ in ranked)
    steepest, *others = [f for f, _ in ranked]
    return (
        "From about half of the parameters to all of them, each doubling changes the score by: "
        f"{listed}.{_most(steepest, others)}"
    )


def _signed(final: Final) -> str:
    spread = "" if final.spread is None else f" ± {final.spread:.3f}"
    return f"{final.mean:+.3f}{spread}"


def _most(steepest: Final, others: list[Final]) -> str:
    """Who gains most from size, as far as noise lets one say it."""
    if steepest.mean is not None and steepest.mean >= 0:
        return " Nobody gains from size on so many tokens."
    if not others:
        return ""
    name, noise = steepest.entry["name"], noise_of([steepest, *others])
    if noise is None:
        return f" {name} gains most from size, as far as a single seed can tell."
    tied = [f.entry["name"] for f in others if noise.tied(steepest, f)]
    if not tied:
        return f" {name} gains most from size, by more than the noise floor of {noise}."
    return (
        f" {name} gains most from size, but within the noise floor of {noise} and so not told "
        f"from: {', '.join(tied)}."
    )


def _double_size(summary: Summary) -> str:
    """Whether the order of the finalists would turn."""
    if len(summary.sized) < 2:
        return ""
    turned = turns(summary.sized)
    noise = noise_of([pair.doubled for pair in summary.sized])
    said = "Extrapolated along these slopes to twice the size, "
    if not turned:
        said += "the order of these finalists stays as it is"
    else:
        said += "the order would turn: " + "; ".join(_turn(a, b, noise) for a, b in turned)
    return f"{said}. Two sizes do not make a law, and nothing of that size was trained."


def _turn(a: Final, b: Final, noise: Noise | None) -> str:
    said = f"{a.entry['name']} before {b.entry['name']}"
    if noise is None:
        return f"{said} (too few seeds to tell that from noise)"
    by = f"by {noise.gap(a, b):.3f}"
    return f"{said} ({by}, {'within' if noise.tied(a, b) else 'above'} the noise floor of {noise})"


def _no_twins(summary: Summary) -> str:
    names = {entry["id"]: entry["name"] for entry in summary.entries}
    refused = [(own, t.entry["refusal"]) for own, t in summary.twins.items() if t.entry["refusal"]]
    listed = "; ".join(f"{names[own]} ({why})" for own, why in refused)
    return f"Not trained at a second size: {listed}." if listed else ""


def _against_baselines(summary: Summary) -> str:
    baselines: dict[str, float] = summary.study.get("baselines", {})
    if not baselines:
        return ""
    listed = ", ".join(f"{value:.3f} ({name})" for name, value in baselines.items())
    said = f"Without a neural network the held-out data score {listed} {summary.unit}"
    if summary.winner is None or summary.winner.mean is None:
        return f"{said}."
    sign = summary.metric.sign
    lost = [name for name, value in baselines.items() if sign * value <= summary.winner.mean]
    place = f"worse than {' and '.join(lost)}" if lost else "better than every one of them"
    return f"{said}; the winner {summary.show(summary.winner.mean)}, {place}."


def _control(summary: Summary) -> str:
    medians = {}
    for group in ("proxy", "random"):
        of_group = (s for s in summary.standings if s.entry["group"] == group)
        scores = [score for s in of_group if (score := s.score("0")) is not None]
        if not scores:
            return ""
        medians[group] = f"{summary.show(statistics.median(scores))} ({len(scores)})"
    return (
        f"On the first rung the candidates that the proxy chose have a median of "
        f"{medians['proxy']} {summary.unit}, the random control group {medians['random']}."
    )


def _proxy(summary: Summary) -> str:
    agreement = summary.agreements.get(ANALYTIC)
    return f"What the proxy was worth: {agreement.verdict}" if agreement else ""


def _further_proxies(summary: Summary) -> str:
    """Each by one number; the table has the rest."""
    regions = {name: w.in_band for name, w in summary.agreements.items() if name != ANALYTIC}
    if not regions:
        return ""
    taus = {name: region.proxy.kendall_tau_b for name, region in regions.items()}
    defined = {name: t.value for name, t in taus.items() if t.value is not None}
    ranked = sorted(regions, key=lambda name: -defined.get(name, -math.inf))
    listed = ", ".join(f"{name} {taus[name]}" for name in ranked)
    only = regions[ranked[0]].parameters.kendall_tau_b
    return (
        f"Further proxies inside the parameter band, Kendall tau-b with training: {listed}; "
        f"parameter count only: {only}."
    )


def _estimates(summary: Summary) -> str:
    ratios = summary.estimate_ratios.items()
    listed = ", ".join(f"{ratio:.2f} for {family} ({n})" for family, (ratio, n) in ratios)
    return f"Estimated over real parameters, median per family: {listed}." if ratios else ""


def _repeated(summary: Summary) -> str:
    share = summary.data.get("repeated")
    if share is None:
        return ""
    return f"{share:.1%} of the held-out bytes repeat a stretch of the training text verbatim."
