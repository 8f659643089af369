"""The report says what the journal holds: hand-computed numbers, and pages that a browser takes."""

import json
import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kizzasi.errors import StudyError
from kizzasi.nas.report import findings, html, markdown, summarise, table, write_report
from kizzasi.nas.storage import Journal, read_events
from kizzasi.nas.svg import Axis, pareto_front, short

RUNGS = (32_768, 98_304)
FINAL_TOKENS = 262_144
HOSTILE = '<script>alert("x")</script> | `b` \x1b[31m \udcff.txt'
VOID = {"meta", "br", "hr", "img", "link"}


def spec(family, n_layers, d_model):
    one = {
        "mamba": ({"kind": "mamba", "d_state": 16, "expand": 2.0}, None),
        "transformer": (
            {"kind": "attention", "n_heads": 4, "n_kv_heads": None, "window": None},
            {"kind": "swiglu", "hidden": 3 * d_model},
        ),
    }
    pairs = [one[name] for name in family.split("+")]
    blocks = [
        {"mixer": pairs[i % len(pairs)][0], "channel": pairs[i % len(pairs)][1], "norm": "rms"}
        for i in range(n_layers)
    ]
    stem = {"kind": "tokens", "vocab_size": 256}
    fixed = {"norm": "rms", "norm_eps": 1e-5, "embed_norm": False, "tie_head": False}
    return {"d_model": d_model, "blocks": blocks, "stem": stem, **fixed, "dropout": 0.0}


def candidate(i, group, family, params, proxy):
    return {
        "event": "candidate",
        "id": f"{i:012x}",
        "group": group,
        "name": f"{family} preset" if group == "preset" else f"{family} d96 L4 n16 x{i}",
        "family": family,
        "spec": spec(family, 2 + i % 4, 96),
        "proxy": proxy,
        "params": params,
        "estimated_params": None if group == "preset" else round(params * (0.5 + 0.01 * i)),
        "state_bytes": 10_000 * (i + 1) ** 2,
    }


def trial(entry, rung, score, tokens, *, lr=6e-3, seed=0, failure=None, horizon=98_304):
    floor = 2.0 if score is None else score
    steps = range(10_240, tokens + 1, 10_240)
    curve = [[t, floor + 5 * math.exp(-t / 15_000)] for t in steps]
    if failure:
        curve = [*curve[:2], [curve[2][0] if len(curve) > 2 else 30_000, 14.0]]
    return {
        "event": "trial",
        "id": f"{entry['id']}{seed}{lr}{horizon}-{tokens}",
        "candidate": entry["id"],
        "rung": rung,
        "seed": seed,
        "lr": lr,
        "tokens": tokens,
        "bits_per_byte": score,
        "seconds": 2.0,
        "tokens_per_second": tokens / 2,
        "curve": curve,
        "failure": failure,
    }


def study(name="topics"):
    return {
        "event": "study",
        "config": {"n_params": 200_000, "rungs": list(RUNGS), "data": name, "keep": 0.34},
        "corpus": {
            "name": name,
            "digest": "ab" * 32,
            "n_bytes": 600_000,
            "n_held_out": 60_000,
            "repeated": 0.0123,
        },
        "baselines": {"unigram": 4.7, "bigram": 3.6, "xz": 2.6},
    }


def complete_events(final_seeds=3, gap=0.1, failures=False, name="topics"):
    """A search of 2 presets and 12 candidates, as `kizzasi.nas.search` would write it."""
    rng = random.Random(0)
    families = ("mamba", "transformer", "mamba+transformer")
    entries = [candidate(i, "preset", families[i], 200_000 + i, None) for i in range(2)]
    for i in range(2, 14):
        group = "proxy" if i < 7 else "random" if i < 12 else "outside"
        size = rng.randint(160_000, 240_000) if group != "outside" else 900_000
        entries.append(candidate(i, group, families[i % 3], size, 0.9 - 0.02 * i))
    events = [study(name), *entries]
    first = {e["id"]: 3 + 0.05 * i + rng.uniform(-0.05, 0.05) for i, e in enumerate(entries)}
    broken = entries[5]["id"] if failures else None
    reason = "diverged: 14 nats at step 30; lower the lr" if failures else None
    for family in families:
        entry = next(e for e in entries if e["family"] == family)
        score = first[entry["id"]]
        events.append(trial(entry, "0", score - 1, RUNGS[0], lr=3e-3))  # not the chosen one
        events.append(trial(entry, "0", score, RUNGS[0]))
        events.append(trial(entry, "0", None, RUNGS[0], lr=1.2e-2, failure=f"{HOSTILE}\nlast"))
        scores = {"0.003": score - 1, "0.006": score, "0.012": None}
        chosen = {"event": "lr", "family": family, "candidate": entry["id"], "scores": scores}
        events.append({**chosen, "lr": 6e-3})
    tried = {e["candidate"] for e in events if e["event"] == "trial"}
    for entry in entries:
        if entry["id"] == broken:
            events.append(trial(entry, "0", None, RUNGS[0], failure=reason))
        elif entry["id"] not in tried:
            events.append(trial(entry, "0", first[entry["id"]], RUNGS[0]))
    ranked = sorted((e for e in entries if e["id"] != broken), key=lambda e: first[e["id"]])
    kept = [e for e in ranked if e["group"] != "outside"][:5]
    events += [trial(e, "1", first[e["id"]] - 0.5, RUNGS[1]) for e in kept]
    winner = next(e for e in kept if e["group"] != "preset")
    preset = next(e for e in kept if e["group"] == "preset")
    finals = {}
    for entry, score in ((winner, 2.3), (preset, 2.3 + gap)):
        finals[entry["id"]] = [
            trial(entry, "final", score + 0.02 * s, FINAL_TOKENS, seed=s, horizon=FINAL_TOKENS)
            for s in range(final_seeds)
        ]
        events += finals[entry["id"]]
    ranking = list(dict.fromkeys(e["id"] for e in [*kept, *ranked]))
    result = {"event": "result", "winner": winner["id"], "preset": preset["id"]}
    for key, entry in (("winner_trials", winner), ("preset_trials", preset)):
        result[key] = [t["id"] for t in finals[entry["id"]]]
    return [*events, {**result, "ranking": ranking}]


CASES = {
    "empty": [],
    "begun": [study()],
    "sampled": complete_events()[:15],
    "first trial": complete_events()[:16],
    "half-done": complete_events()[:40],
    "before the result": complete_events()[:-1],
    "complete": complete_events(),
    "failures": complete_events(failures=True),
    "hostile": complete_events(name=HOSTILE),
    "only failures": [
        study(),
        candidate(2, "proxy", "mamba", 9, 0.5),
        {**trial(candidate(2, "proxy", "mamba", 9, 0.5), "0", None, 0), "failure": "leaks"},
    ],
}
