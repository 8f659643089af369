"""The parts of a layer in EvoForge's words where these make the very same part, else in the house's
own. Whether words reach is not asked here: who uses them compiles them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kizzasi.models import BlockSpec
from kizzasi.nas.pipelines.compiling.attention import ROTATED
from kizzasi.nas.pipelines.compiling.channels import GATES, NORMS
from kizzasi.nas.pipelines.writing import said

NAMES = {kind: name for name, kind in NORMS.items()}
NOWHERE = {"kind": "none"}
# Mixers that read positions and a cache, and the field that says how many entries are rotated.
ATTENDS = {"attention": "rope_dims", "mla": "qk_rope_head_dim"}


def block_words(block: BlockSpec, d_model: int) -> Iterator[dict[str, Any]]:
    """Ways to say a block, the most telling first."""
    for mixer, around in _mixers(block.mixer):
        for ffn in _channels(block.channel, d_model):
            words = {**mixer, **ffn, **around}
            yield {**words, "norm": NAMES[block.norm], **_residual(block)}


def _residual(block: BlockSpec) -> dict[str, Any]:
    beside = {} if block.parallel is None else {"beside": block.parallel}
    if block.norm_at == "pre" and block.residual_scale == 1:
        return {"residual": {"kind": "single", **beside}} if beside else {}
    if block.norm_at == "post" and block.residual_scale == 1:
        return {"residual": {"kind": "deepnet", "scale": block.stream_scale, **beside}}
    norms = {"pre_ln": block.norm_at != "post", "post_ln": block.norm_at != "pre"}
    return {"residual": {"kind": "dual", **norms, "scale": block.residual_scale, **beside}}


def _mixers(spec: Any) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """A mix unit, and what the stack around it has to say."""
    data = spec.to_dict()
    merges = {"sum": "Add", "weighted": "WeightedAdd", "concat": "Concat"}
    if spec.kind == "parallel":
        units = {"kind": "par", "merge": merges[data["combine"]]}
        for words, around in _choices(spec.mixers):
            yield {"mix_unit": {**units, "choices": words}}, around
    elif spec.kind == "routed" and not data["channels"]:
        router = {"topk": data["top_k"], "temp": data["temperature"]}
        router["balance"] = data["balance_weight"]
        for words, around in _choices(spec.mixers):
            yield {"mix_unit": {"kind": "route", "choices": words, "router": router}}, around
    for words, around in _choices((spec,)):
        yield {"mix_unit": {"kind": "single", "mixer": words[0]}}, around


def _choices(specs: tuple[Any, ...]) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    pos = next((p for spec in specs if (p := _positions(spec))), {})
    kv = next((p for spec in specs if (p := _cache(spec.to_dict()))), {})
    words = [_words(spec) for spec in specs]
    for spec, word in zip(specs, words, strict=True):
        if spec.kind in ATTENDS and (own := _position(spec)) != pos.get("pos", NOWHERE)["kind"]:
            word["pos"] = own
    if any(word != said_own for word, said_own in zip(words, map(_own, specs), strict=True)):
        yield words, {**pos, **kv}
    yield [_own(spec) for spec in specs], {}


def _own(spec: Any) -> dict[str, Any]:
    return said(spec)


def _words(spec: Any) -> dict[str, Any]:
    """A mixer in EvoForge's words, as far as they go; whether they reach is seen by compiling."""
    data = spec.to_dict()
    if spec.kind == "attention":
        found = {"heads": data["n_heads"], "groups": data["n_kv_heads"]}
        found |= {"head_dim": data["head_dim"], "stencil": _stencil(data)}
        softmax = {"softcap": data["softcap"], "qk_scale": data["scale"]}
        if data["qk_norm"]:
            softmax["qk_norm"] = data["qk_norm_kind"]
        found["softmax"] = given(softmax) or None
        found["value_glu"] = data["value_glu"] or None
        if data["qkv_rank"] is not None:
            low = {"type": "low_rank", "rank": data["qkv_rank"], "shared": data["qkv_shared"]}
            found["projection"] = low
        return {"kind": "Attention", **given(found)}
    if spec.kind == "mla":
        found = {"heads": data["n_heads"], "head_dim": spec.qk_head_dim}
        softmax = None if data["scale"] is None else {"qk_scale": data["scale"]}
        return {"kind": "Attention", **given({**found, "softmax": softmax})}
    if spec.kind == "kernel_attention":
        kernel = {"name": data["feature"], "features": data["n_features"]}
        kernel |= {"orthogonal": data["orthogonal"], "redraw": data["redraw"]}
        found = {"heads": data["n_heads"], "head_dim": data["head_dim"]}
        return {
            "kind": "Attention",
            **given(found),
            "softmax": {"type": "kernel", "kernel": kernel},
        }
    if spec.kind == "retention":
        return {"kind": "Retention", "heads": data["n_heads"]}
    if spec.kind == "mamba":
        return {"kind": "SSM", "d_state": data["d_state"], "expand": data["expand"]}
    if spec.kind == "long_conv":
        return {"kind": "LongConv", "kernel_len": data["max_len"]}
    return _own(spec)


def _stencil(data: Mapping[str, Any]) -> dict[str, Any] | None:
    window, block = data["window"], data["block"]
    if block is not None:
        return {"kind": "ring" if data["n_blocks"] == 2 else "block", "block": block}
    if window is None:
        return None
    if data["n_global"]:
        return {"kind": "hybrid", "window": window, "globals": data["n_global"]}
    if data["dilation"] > 1:
        return {"kind": "dilated", "window": window, "dilation": data["dilation"]}
    return {"kind": "local", "window": window}


def _position(spec: Any) -> str:
    return "relbias" if spec.position == "relative" else spec.position


def _positions(spec: Any) -> dict[str, Any]:
    if spec.kind == "retention":
        return {"pos": {"kind": "rope", "rope": {"theta": spec.rope_theta}}}
    if spec.kind not in ATTENDS:
        return {}
    data = spec.to_dict()
    pos: dict[str, Any] = {"kind": _position(spec)}
    if data["position"] in ROTATED:
        scaling, stretch = data["rope_scaling"], None
        if scaling is not None:
            numbers = {"divisors": scaling["divisors"]} if scaling["divisors"] else None
            stretch = {"type": scaling["method"], "factor": scaling["factor"]}
            stretch |= {"original_context": scaling["original_context"], "longrope": numbers}
            stretch = given(stretch)
        dims = data[ATTENDS[spec.kind]]
        rope = {"theta": data["rope_theta"], "dims": dims, "scaling": stretch}
        pos["rope"] = given(rope)
    return {"pos": pos} if pos["kind"] != "none" else {}


def _cache(data: Mapping[str, Any]) -> dict[str, Any]:
    quant = data.get("kv_quant", "none")
    if data["kind"] == "mla":
        return {"kv_policy": _latents(data)}
    if quant == "none":
        return {}
    return {"kv_policy": given({"cache": "full", "quant": quant, "group": data["kv_group"]})}


def _latents(data: Mapping[str, Any]) -> dict[str, Any]:
    """A latent cache."""
    parts, every, fade = data["n_latents"], data["every"], data["fade"]
    latent = {"dim": data["kv_lora_rank"], "heads": parts if parts > 1 else None}
    if (every, fade) != (1, 0):
        latent["update"] = {"kind": "ema", "tau": fade, "freq": every}
    quant = data["kv_quant"]
    policy = {"cache": "latent", "latent": given(latent)}
    return policy if quant == "none" else {**policy, "quant": quant}


def _channels(spec: Any, d_model: int) -> Iterator[dict[str, Any]]:
    if spec is None:
        yield {}
        return
    data = spec.to_dict()
    gates = {gate: name for name, gate in GATES.items()}
    mult = None if data.get("hidden") is None else data["hidden"] / d_model
    if spec.kind == "mlp":
        yield {"ffn": given({"kind": "dense", "mult": mult, "act": data["activation"]})}
    if spec.kind == "swiglu" and data["activation"] in gates:
        yield {"ffn": given({"kind": "dense", "mult": mult, "act": gates[data["activation"]]})}
    if spec.kind == "moe":
        found = {"mult": mult, "act": "swiglu", "experts": data["n_experts"]}
        found |= {"topk": data["top_k"], "capacity": data["capacity_factor"] or None}
        yield {"ffn": given({"kind": "moe", **found})}
    yield {"ffn": _own(spec)}


def given(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if value is not None}
