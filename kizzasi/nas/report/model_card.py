"""The model card of a winner: what it is, how it was found and measured, and how to use it."""

from __future__ import annotations

import json
import shlex

from kizzasi.errors import StudyError
from kizzasi.models import ModelSpec
from kizzasi.nas.report.pages import md, md_json, md_lineage, md_rows, md_table
from kizzasi.nas.report.sentences import conclusions
from kizzasi.nas.report.svg import short
from kizzasi.nas.report.tables import finalist_tables, layer_table
from kizzasi.nas.results.finals import Event, Final
from kizzasi.nas.results.summary import Summary
from kizzasi.nas.results.words import said

LICENSE = (
    "Not stated. Whoever publishes this model states here under which license its weights are, "
    "after a look at the license of the training data."
)


def model_card(summary: Summary, spec: ModelSpec) -> str:
    """The card as Markdown.

    Args:
        summary: of a finished run with a winner.
        spec: of the winner.
    """
    winner = summary.saved or summary.winner
    assert winner is not None, "a card without a winner"
    entry, kept = winner.entry, saved_trial(winner)
    parts = {
        "": _introduction(summary, winner, spec),
        "Use": _use(summary, kept),
        "Architecture": f"{md_rows(layer_table(summary))}\n\nDigest of the spec: `{spec.digest}`",
        "Data": _data(summary),
        "Training": _training(summary, winner, kept),
        "Scores": _scores(summary),
        "Caveats": _caveats(summary),
        "Lineage": md_lineage(summary),
        "Search": md_json(json.dumps(summary.study.get("config"), indent=1)),
        "License": LICENSE,
    }
    body = "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in parts.items())
    return f"---\nlibrary_name: kizzasi\n---\n\n# {md(entry['name'])}\n\n{body}\n"


def saved_trial(winner: Final) -> Event:
    """The final training whose weights the search kept: the best of the seeds."""
    scored = [trial for trial in winner.trials if trial["score"] is not None]
    if not scored:
        raise StudyError("no final training of the winner has a score; its run is damaged")
    return min(scored, key=lambda trial: trial["score"])


def _introduction(summary: Summary, winner: Final, spec: ModelSpec) -> str:
    cost = spec.cost(1024)
    return (
        f"A sequence model with {cost.params:,} parameters and "
        f"{len(spec.blocks)} layers, found by an architecture search among "
        f"{len(summary.entries)} candidates. It reaches {summary.say(winner)} on held-out "
        f"data. Its state after 1,024 tokens takes {short(cost.state_bytes)}B."
    )


def _use(summary: Summary, kept: Event) -> str:
    score, anew, further = _commands(summary, kept)
    number = f"{summary.metric.show(kept['score'], 4)} {summary.unit}"
    return (
        "```python\n"
        "import torch\n\n"
        "from kizzasi.models import load\n\n"
        'model = load(".")  # this folder\n'
        'out = model.generate(torch.tensor(list(b"The ")), max_new_tokens=200, seed=0)\n'
        'print(bytes(out.tolist()).decode("utf-8", errors="replace"))\n'
        "```\n\n"
        "```sh\n"
        'python generate.py "The "\n'
        f"# these weights on what decided the search: {number}\n{score}\n"
        f"# these weights once more, from the architecture alone: {number}\n{anew}\n"
        f"# these weights trained further\n{further}\n"
        "```"
    )


def _commands(summary: Summary, kept: Event) -> tuple[str, str, str]:
    """What scores the model, trains it anew with the same score, and trains it further."""
    config = summary.study.get("config", {})
    source = config.get("data")
    data = f" --data {_word(source or 'builtin')}"
    if "data" not in config or config.get("test_fraction", 0.1) != 0.1:
        data = " --data DATA"
    lr = kept["settings"].get("lr")
    rate = "" if lr is None else f" --lr {lr!r}"
    optimizer = f" --optimizer {_word(config['optimizer'])}" if "optimizer" in config else ""
    cut = "".join(
        f" --{name.replace('_', '-')} {config[name]}"
        for name in ("seq_len", "batch_size")
        if name in config
    )
    windows = f" --score-windows {config['score_windows']}" if "score_windows" in config else ""
    whole = f" --tokens {kept['tokens']} --seed {kept['seed']}{rate}{optimizer}{cut}{windows}"
    return (
        f"kizzasi score .{data}{cut}{windows}",
        f"kizzasi train spec.yaml{data}{whole} --out again",
        f"kizzasi train . --tokens 10000000{data}{rate}{optimizer}{cut} --out longer",
    )


def _word(value: object) -> str:
    """A word for a shell; DATA where the name itself could mean something to a page."""
    text = str(value)
    plain = text.isprintable() and not set(text) & set("`<>&")
    return shlex.quote(text) if plain else "DATA"


def _data(summary: Summary) -> str:
    corpus = summary.data
    size = f", {corpus['n_bytes']:,} bytes" if "n_bytes" in corpus else ""
    facts = [f"- {md(str(corpus.get('name', 'without a name')))}{size}"]
    if corpus.get("digest"):
        facts.append(f"- sha256 `{md(corpus['digest'])}`")
    if "n_held_out" in corpus:
        facts.append(f"- {corpus['n_held_out']:,} held out, never trained on")
    if corpus.get("repeated") is not None:
        facts.append(f"- {corpus['repeated']:.1%} of them repeat training text verbatim")
    return "\n".join(facts)


def _training(summary: Summary, winner: Final, kept: Event) -> str:
    seeds = ", ".join(str(trial["seed"]) for trial in winner.trials)
    spent = sum(trial["seconds"] for trial in summary.trials)
    return (
        f"- {kept['tokens']:,} tokens from scratch, {said(kept['settings'])}\n"
        f"- seeds {seeds}; the weights are those of seed {kept['seed']}, the best of them "
        f"({summary.metric.show(kept['score'], 4)} {summary.unit})\n"
        f"- the whole search trained for {spent:.0f} s in {len(summary.trials)} trials"
        f"{_versions(summary)}"
    )


def _versions(summary: Summary) -> str:
    told = summary.study.get("versions") or {}
    named = ", ".join(f"{md(str(name))} {md(str(own))}" for name, own in told.items())
    return f"\n- with {named}" if named else ""


def _scores(summary: Summary) -> str:
    """Scores on held-out data, mean and standard deviation over the seeds."""
    baselines = summary.study.get("baselines", {})
    rows = [["baseline", summary.unit], *([n, f"{v:.3f}"] for n, v in baselines.items())]
    noise = f"Noise floor: {summary.noise}." if summary.noise else "The noise floor is not known."
    parts = [f"### {p.title}\n\n{md_table(p)}" for p in finalist_tables(summary) if p.rows[1:]]
    matched = "\n\n".join(parts)
    return f"{noise}\n\n{matched}\n\n### Baselines\n\n{md_rows(rows)}"


def _caveats(summary: Summary) -> str:
    said = [
        "Ranks at this size and budget need not hold at larger ones.",
        *conclusions(summary)[1:],
    ]
    return "\n".join(f"- {md(text)}" for text in said)
