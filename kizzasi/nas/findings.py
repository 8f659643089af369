"""What a run found, in words: progress, the winner's duel, ties, proxies' worth, caveats."""

from __future__ import annotations

import math
import statistics

from kizzasi.nas.finalists import Final, Noise
from kizzasi.nas.summary import ANALYTIC, Summary


def findings(summary: Summary) -> list[str]:
    """Every finding as a sentence or two; what is not known yet is left out."""
    said = (
        _progress,
        _refused,
        _duel,
        _ties,
        _against_baselines,
        _control,
        _proxy,
        _further_proxies,
        _estimates,
        _repeated,
    )
    return [text for text in (say(summary) for say in said) if text]


def _progress(summary: Summary) -> str:
    state = "complete" if summary.finished else "not complete; --resume continues one that stopped"
    failed = len(summary.failures)
    return (
        f"The search is {state}: {len(summary.standings)} candidates, "
        f"{len(summary.trials)} trials, {failed or 'none'} of them failed."
    )


def _refused(summary: Summary) -> str:
    listed = ", ".join(f"{rule} {n}" for rule, n in summary.refused.items())
    return f"Refused before any training, by rule: {listed}." if listed else ""


def _duel(summary: Summary) -> str:
    winner, preset = summary.winner, summary.preset
    if winner is None:
        return "No winner has been trained at the final budget yet."
    said = (
        f"Trained anew on {winner.tokens:,} tokens, the winner {winner.entry['name']} "
        f"({winner.entry['params']:,} parameters) reaches {winner}"
    )
    if preset is None:
        return f"{said}; there is no preset to compare it with."
    return (
        f"{said}; the best preset, {preset.entry['name']} ({preset.entry['params']:,} "
        f"parameters), on {preset.tokens:,} tokens: {preset}. "
        f"{_outcome(winner, preset, summary.noise)}."
    )


def _outcome(winner: Final, preset: Final, noise: Noise | None) -> str:
    """A difference is one only if it is above the noise floor."""
    w, p = winner.mean, preset.mean
    if w is None or p is None:
        return "One of the two has failed, so they cannot be compared"
    if noise is None:
        place = "ahead" if w < p else "behind"
        return (
            f"The winner is {place} by {abs(p - w):.3f} bits/byte; without two seeds that both "
            "finished nothing tells that from noise"
        )
    gap = noise.gap(winner, preset)
    if noise.tied(winner, preset):
        return f"This is a tie: {abs(gap):.3f} bits/byte are within the noise floor of {noise}"
    verb = "beats" if gap > 0 else "loses to"
    return (
        f"The winner {verb} the preset by {abs(gap):.3f} bits/byte, more than the noise floor "
        f"of {noise}"
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


def _against_baselines(summary: Summary) -> str:
    baselines: dict[str, float] = summary.study.get("baselines", {})
    if not baselines:
        return ""
    listed = ", ".join(f"{value:.3f} ({name})" for name, value in baselines.items())
    said = f"Without a neural network the held-out bytes cost {listed} bits/byte"
    if summary.winner is None or summary.winner.mean is None:
        return f"{said}."
    lost = [name for name, value in baselines.items() if value <= summary.winner.mean]
    needs = f"more than {' and '.join(lost)}" if lost else "less than every one of them"
    return f"{said}; the winner needs {summary.winner.mean:.3f}, {needs}."


def _control(summary: Summary) -> str:
    medians = {}
    for group in ("proxy", "random"):
        of_group = (s for s in summary.standings if s.entry["group"] == group)
        scores = [score for s in of_group if (score := s.score("0")) is not None]
        if not scores:
            return ""
        medians[group] = f"{statistics.median(scores):.3f} ({len(scores)})"
    return (
        f"On the first rung the candidates that the proxy chose have a median of "
        f"{medians['proxy']} bits/byte, the random control group {medians['random']}."
    )


def _proxy(summary: Summary) -> str:
    worth = summary.worths.get(ANALYTIC)
    return f"What the proxy was worth: {worth.verdict}" if worth else ""


def _further_proxies(summary: Summary) -> str:
    """Each by one number; the table has the rest."""
    regions = {name: w.in_band for name, w in summary.worths.items() if name != ANALYTIC}
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
    share = summary.study.get("corpus", {}).get("repeated")
    if share is None:
        return ""
    return f"{share:.1%} of the held-out bytes repeat a stretch of the training text verbatim."
