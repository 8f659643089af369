"""Latents of a document: bits that a non-causal encoder chooses, and that later layers read.

A `cond` with free bits says how many bits (source.H), how many cost nothing (reg.kappa), and how
they are read (ops). In a pipeline the encoder is the stage that a latent_sampler has as input, and
the stages that name the sampler read the bits. In a single stack the upper half reads them, and the
encoder is one layer like the others, over the whole document.

Source: Fleuret 2025, arXiv:2510.17558, section 3.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from kizzasi.models import BlockSpec, LayerSpec
from kizzasi.nas.pipelines.misfits import DROP, Findings
from kizzasi.nas.pipelines.parts import Cond
from kizzasi.strict import Strict

READS = {"film": "film", "lora": "lora", "add": "add"}


def is_latent(cond: Cond | None) -> bool:
    return cond is not None and cond.reg is not None and cond.reg.kind == "freebits"


def latent_fields(cond: Cond | None, path: str, findings: Findings) -> dict[str, Any]:
    """The fields of a latent layer beside its body and encoder."""
    if cond is None:
        findings.add(path, "a latent has none", "give it a cond with ops")
        return {"inject": ["add"]}
    source, reg = cond.source, cond.reg
    found: dict[str, Any] = {}
    if source is not None:
        if source.kind == "segment" or source.segment is not None:
            rule = "a latent has bits of every token"
            findings.add(
                f"{path}.source",
                rule,
                "give pool-mlp",
                (f"{path}.source.kind", "pool-mlp"),
                (f"{path}.source.segment", DROP),
            )
        found["n_bits"] = source.H
    if reg is not None and reg.kind == "freebits":
        found["free_bits"] = reg.kappa
    elif reg is not None:
        found["free_bits"] = 0.0
        if reg.kappa is not None:
            findings.drop(f"{path}.reg.kappa", "'none' has no free bits")
    found |= _reading(cond, path, findings)
    return {name: value for name, value in found.items() if value is not None}


def _reading(cond: Cond, path: str, findings: Findings) -> dict[str, Any]:
    inject: list[str] = []
    rank = None
    for i, op in enumerate(cond.ops):
        where = f"{path}.ops[{i}]"
        kind = op.op
        if kind not in READS:
            kind = findings.set(
                f"{where}.op", f"{kind!r}: bits are read by film, add and lora", "film"
            )
        if op.where != "pre_mixer":
            findings.set(f"{where}.where", f"{op.where!r}: layers read the bits first", "pre_mixer")
        if op.share not in (None, "per_channel"):
            findings.drop(f"{where}.share", "bits are read by every channel")
        if kind in inject:
            findings.drop(where, f"{kind!r} is there already")
            continue
        inject.append(kind)
        if kind == "lora":
            rank = op.r
            if rank is None:
                rank = findings.set(f"{where}.r", "'lora' needs it", 4)
        elif op.r is not None:
            findings.drop(f"{where}.r", f"{kind!r} has no rank")
    return {"inject": inject or ["add"], "rank": rank}


def latent(body: list[Any], encoder: list[Any], given: dict[str, Any]) -> Any:
    """The layer: its body reads what its encoder chooses."""
    stacks = {
        "body": [one.to_dict() for one in body],
        "encoder": [one.to_dict() for one in encoder],
    }
    return LayerSpec.from_dict({"kind": "latent", **stacks, **given})


def encoder_of(layers: list[Any], path: str, findings: Findings) -> list[Any]:
    """The layers over the whole document: attention that sees later tokens too."""
    found = []
    for one in layers:
        mixer = _attention(one.mixer) if isinstance(one, BlockSpec) else None
        if mixer is None:
            findings.add(path, "an encoder is made of attention", "give it mixers of attention")
            return []
        whole = {"causal": False, "window": None, "block": None, "n_blocks": 1, "n_global": 0}
        whole |= {"dilation": 1, "kv_quant": "none"}
        found.append(replace(one, mixer=replace(mixer, **whole)))
    return found


def halved(layers: list[Any], cond: Cond, path: str, findings: Findings) -> list[Any]:
    """A stack whose upper half reads the bits of an encoder between the halves."""
    half = len(layers) // 2
    encoder = encoder_of(layers[-1:], f"{path}.reg", findings)
    given = latent_fields(cond, path, findings)
    return [*layers[:half], latent(layers[half:], encoder or layers[-1:], given)]


def _attention(mixer: Any) -> Any:
    """The mixer, or the first one inside it, that is attention; None if there is none."""
    if mixer.kind == "attention":
        return mixer
    inner = [getattr(mixer, field.name) for field in fields(mixer)]
    inside = [one for value in inner if isinstance(value, tuple) for one in value]
    return next((m for m in inside if isinstance(m, Strict) and m.kind == "attention"), None)  # pyright: ignore
