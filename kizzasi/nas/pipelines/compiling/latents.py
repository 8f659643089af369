"""Latents of a document: bits that a non-causal encoder chooses, and that later layers read.

A `cond` with free bits says how many bits (source.H), how many cost nothing (reg.kappa), and how
they are read (ops). In a pipeline the encoder is the stage that a latent_sampler has as input, and
the stages that name the sampler read the bits. In a single stack the upper half reads them, and the
encoder is one layer like the others, over the whole document.

Source: Fleuret 2025, arXiv:2510.17558, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from kizzasi.models import BlockSpec, LayerSpec
from kizzasi.models.layers.latent import MOST_IN_A_TABLE, LatentSpec
from kizzasi.nas.pipelines.misfits import DROP, Findings
from kizzasi.nas.pipelines.parts import Cond, Op
from kizzasi.strict import Strict

READS = ("film", "lora", "add")
TURNED = {"ln": "norm", "proj_q": "q", "q": "q", "proj_v": "v", "v": "v"}
NOT_THERE = {
    "norm": "this layer has no norms before its branches",
    "q": "of this layer's mixers none is attention, or several with other queries",
    "v": "of this layer's mixers none is attention with values of its own, or several with others",
}
CROSSES = "is no plain attention, which alone can look at another stream"


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
        if source.kind != "pool-mlp" or source.segment is not None:
            rule = "a latent has bits of every token"
            findings.add(
                f"{path}.source",
                rule,
                "give pool-mlp",
                (f"{path}.source.kind", "pool-mlp"),
                (f"{path}.source.segment", DROP),
            )
        found |= {"n_bits": source.H, "query": source.query, "form": source.form}
        found["seed"] = source.seed
        if source.form == "table" and (source.H or LatentSpec.n_bits) > MOST_IN_A_TABLE:
            rule = "a table has a row for each pattern of bits"
            found["n_bits"] = findings.set(f"{path}.source.H", rule, MOST_IN_A_TABLE)
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
    places: dict[str, str] = {}
    rank = None
    for i, op in enumerate(cond.ops):
        where = f"{path}.ops[{i}]"
        kind = op.op
        if kind not in READS:
            kind = findings.set(
                f"{where}.op", f"{kind!r}: bits are read by film, add and lora", "film"
            )
        if op.where == "proj_kv" and kind != "add":
            rule = "keys and values are made of what is added, and nothing else"
            findings.set(f"{where}.where", rule, "pre_mixer")
        elif op.where == "proj_kv":
            kind = "kv"
        elif op.where in TURNED and kind != "add":
            places[f"{kind}_at"] = TURNED[op.where]
        elif op.where != "pre_mixer":
            findings.set(f"{where}.where", f"{op.where!r}: layers read the bits first", "pre_mixer")
        if op.share not in (None, "per_channel"):
            findings.drop(f"{where}.share", "bits are read by every channel")
        if kind in inject or {"add", "kv"} <= {kind, *inject}:
            rule = f"{op.op!r} is there already"
            findings.drop(where, rule if kind in inject else f"{rule}, for keys and values too")
            continue
        inject.append(kind)
        if kind == "lora":
            rank = op.r
            if rank is None:
                rank = findings.set(f"{where}.r", "'lora' needs it", 4)
        elif op.r is not None:
            findings.drop(f"{where}.r", f"{op.op!r} has no rank")
    return {"inject": inject or ["add"], "rank": rank, **places}


@dataclass(frozen=True)
class Bits:
    """What a latent has beside its body.

    Args:
        encoder: its layers.
        given: its other fields.
        ops: of the cond that says them.
        path: of that cond.
    """

    encoder: list[Any]
    given: dict[str, Any]
    ops: tuple[Op, ...]
    path: str


def latent(body: list[Any], bits: Bits, d_model: int, findings: Findings) -> Any:
    """The layer: its body reads what its encoder chooses."""
    given, encoder, path = bits.given, bits.encoder, bits.path
    if "kv" in given["inject"] and not body[0].crosses:
        i = next(i for i, op in enumerate(bits.ops) if op.where == "proj_kv")
        rule = f"the first layer that reads the bits {CROSSES}"
        findings.set(f"{path}.ops[{i}].where", rule, "pre_mixer")
        given = {**given, "inject": ["add" if one == "kv" else one for one in given["inject"]]}
    if given.get("query") == "learned" and not encoder[0].crosses:
        rule = f"the first layer of the encoder {CROSSES}"
        given = {**given, "query": findings.set(f"{path}.source.query", rule, "stream")}
    for name in ("film_at", "lora_at"):
        at = given.get(name, "stream")
        if at != "stream" and at not in body[0].taps(d_model):
            i = next(i for i, op in enumerate(bits.ops) if f"{op.op}_at" == name)
            rule = f"{bits.ops[i].where!r}: {NOT_THERE[at]}"
            findings.set(f"{path}.ops[{i}].where", rule, "pre_mixer")
            given = {**given, name: "stream"}
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
        whole |= {"dilation": 1, "kv_quant": "none", "kv_group": None}
        found.append(replace(one, mixer=replace(mixer, **whole)))
    return found


def halved(layers: list[Any], cond: Cond, d_model: int, path: str, findings: Findings) -> list[Any]:
    """A stack whose upper half reads the bits of an encoder between the halves."""
    half = len(layers) // 2
    encoder = encoder_of(layers[-1:], f"{path}.reg", findings)
    given = latent_fields(cond, path, findings)
    bits = Bits(encoder or layers[-1:], given, cond.ops, path)
    return [*layers[:half], latent(layers[half:], bits, d_model, findings)]


def _attention(mixer: Any) -> Any:
    """The mixer, or the first one inside it, that is attention; None if there is none."""
    if mixer.kind == "attention":
        return mixer
    inner = [getattr(mixer, field.name) for field in fields(mixer)]
    inside = [one for value in inner if isinstance(value, tuple) for one in value]
    return next((m for m in inside if isinstance(m, Strict) and m.kind == "attention"), None)  # pyright: ignore
