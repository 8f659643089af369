"""Journals of runs that never were, as `kizzasi.nas.search` would write them."""

import math
import random

from kizzasi.nas.evaluators.micro_training import Measurement

RUNGS = (32_768, 98_304)
FINAL_TOKENS = 262_144
# What a preset's seeds add to its scores beyond what they add to the winner's: a paired standard
# deviation of 0.004, so a noise floor of 4.303 * 0.004 / sqrt(3) = 0.00994 over three seeds.
SEED_NOISE = (0.004, -0.004, 0.0)
HOSTILE = '<script>alert("x")</script> | `b` \x1b[31m \udcff.txt'
TRACEBACK = """Traceback (most recent call last):
  File "/somewhere/kizzasi/nas/microtrain.py", line 306, in __call__
    failure = training.run(tokens, on_step)
  File "/somewhere/kizzasi/models/ops/scan.py", line 77, in scan
    h = a * h + u
RuntimeError: sizes 3 and 4 do not match"""


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
    name = f"{family} preset" if group == "preset" else f"{family} d96 L4 n16 x{i}"
    named = {"id": f"{i:012x}", "group": group, "name": name, "family": family}
    return {
        "event": "candidate",
        **named,
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
    run_id = f"{entry['id']}{seed}{lr}{horizon}"
    trained = {"id": f"{run_id}-{tokens}", "rung": rung, "seed": seed}
    trained["settings"] = {"lr": lr}
    measured = Measurement(score, tokens, 2.0, tokens / 2, curve, failure)
    return {"event": "trial", "candidate": entry["id"], **trained, **measured.to_dict()}


def study(name="topics"):
    data = {"name": name, "digest": "ab" * 32, "n_bytes": 600_000, "repeated": 0.0123}
    config = {"n_params": 200_000, "rungs": list(RUNGS), "data": name}
    baselines = {"unigram": 4.7, "bigram": 3.6, "xz": 2.6}
    metric = {"name": "bits/byte"}
    facts = {"metric": metric, "data": data, "baselines": baselines}
    return {"event": "study", "config": config, **facts}


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
        scores = {"lr 0.003": score - 1, "lr 0.006": score, "lr 0.012": None}
        chosen = {"event": "settings", "family": family, "candidate": entry["id"]}
        events.append({**chosen, "scores": scores, "settings": {"lr": 6e-3}})
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
        own = SEED_NOISE if entry is preset else (0.0,)
        finals[entry["id"]] = [
            final(entry, score + 0.02 * s + own[s % len(own)], s) for s in range(final_seeds)
        ]
        events += finals[entry["id"]]
    ranking = list(dict.fromkeys(e["id"] for e in [*kept, *ranked]))
    result = {"event": "result", "winner": winner["id"], "preset": preset["id"]}
    for key, entry in (("winner_trials", winner), ("preset_trials", preset)):
        result[key] = [t["id"] for t in finals[entry["id"]]]
    text = f"def of_the_winner():\n    {name}\n" + "x" * 150
    sample = {"event": "sample", "candidate": winner["id"], "seed": 1, "prompt": "\n", "text": text}
    return [*events, sample, {**result, "ranking": ranking}]


def final(entry, score, seed):
    return trial(entry, "final", score, FINAL_TOKENS, seed=seed, horizon=FINAL_TOKENS)


def evolved_events(generations=4, width=6):
    """A search by evolution with proxies, latencies and inheritance; three finalists, a crash."""
    rng = random.Random(1)
    events, entries, before = [study()], [], []
    for generation in range(generations):
        born = []
        for _ in range(width):
            i = len(entries)
            entry = candidate(i, "evolved", "mamba", 190_000 + 900 * i, None)
            del entry["proxy"], entry["estimated_params"]
            entry["name"] = f"child {i}"
            noise = rng.uniform(-0.2, 0.2)
            score = 4 - 0.3 * generation + noise
            entry |= {"proxies": {"snip": -score, "naswot": noise}, "latency_ms": 3 + 0.5 * i}
            entry["genotype"] = {"d_model": 96, "layers": [{"kind": "mamba"}, {"d_state": i}]}
            if before:
                parents = rng.sample(before, 1 + i % 2)
                entry |= {"parents": [p["id"] for p in parents], "inherited": 0.75}
            failed = TRACEBACK if i == 3 else None
            trained = trial(entry, "0", None if failed else score, RUNGS[0], failure=failed)
            events += [entry, trained]
            entries.append(entry)
            born += [] if failed else [entry]
        before = born
    finals = [
        [final(e, 2.3 + 0.004 * n + 0.02 * s, s) for s in range(3)]
        for n, e in enumerate(before[:2])
    ]
    finals.append([final(before[2], 2.5 + v, s) for s, v in enumerate((0.02, 0.0, 0.04))])
    events += [one for own in finals for one in own]
    result = {
        "event": "result",
        "winner": before[0]["id"],
        "preset": None,
        "refused": {"n_params": 7},
    }
    return [*events, {**result, "ranking": [e["id"] for e in before + entries[:-width]]}]
