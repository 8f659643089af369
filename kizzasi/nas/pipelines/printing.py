"""From a `ModelSpec` to the document that spells it.

A part is written in EvoForge's words where these make the very same part, else in the house's own.
Layers that no words reach are written as a ModelSpec writes them. The document is compiled before
it is handed out: what is printed is the spec, or an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from kizzasi.models import BlockSpec, ModelSpec, Tokens
from kizzasi.nas.pipelines.compiling.attention import ROTATED
from kizzasi.nas.pipelines.compiling.channels import GATES, NORMS
from kizzasi.nas.pipelines.compiling.stack import Frame, layers_of
from kizzasi.nas.pipelines.document import Stack
from kizzasi.nas.pipelines.misfits import Findings
from kizzasi.nas.pipelines.pipeline import Pipeline, examined
from kizzasi.nas.pipelines.reading import read
from kizzasi.nas.pipelines.writing import said
from kizzasi.strict import require

OF_THE_STREAM = ("d_model", "blocks", "norm")
NAMES = {kind: name for name, kind in NORMS.items()}
STACK = {field.name for field in dataclasses.fields(Stack)}


def to_pipeline(spec: ModelSpec, train: Mapping[str, Any] | None = None) -> Pipeline:
    """The pipeline that compiles to this very spec.

    Args:
        spec: valid, with a stem of tokens.
        train: the document's `train`, ctx_len above all; 256 tokens if there is none.

    Raises:
        SpecError: the stem is none of tokens, which a pipeline has no words for.
    """
    spec.check()
    stem = spec.stem
    rule = f"{stem.kind!r}: a pipeline reads tokens; write the spec itself (to_file)"
    require(isinstance(stem, Tokens), "stem", rule)
    assert isinstance(stem, Tokens)
    told = {**(train or {"ctx_len": 256}), "vocab_size": stem.vocab_size}
    arch: dict[str, Any] = {"d_model": spec.d_model}
    runs = [list(run) for _, run in groupby(spec.blocks)]
    stacks = list(_stacks(runs, spec.d_model, told["ctx_len"]))
    model = _of_the_model(spec)
    norm = {"norm": NAMES.get(spec.norm, "RMSNorm")}
    if len(stacks) == 1 and stacks[0]["kind"] == "transformer" and "norm" not in model:
        own = {k: v for k, v in stacks[0].items() if k != "kind"}
        if own["norm"] == norm["norm"]:
            data = {"arch": {**arch, **own, **model}, "train": told}
            if (found := _same(data, spec)) is not None:
                return found
    modules, stages = _named(stacks)
    data = {"arch": {**arch, **norm, **model, **modules, **stages}, "train": told}
    found = _same(data, spec)
    assert found is not None, "a printed pipeline compiles to its spec"
    return found


def _same(data: Mapping[str, Any], spec: ModelSpec) -> Pipeline | None:
    """The pipeline of these data, if its spec is this one."""
    pipeline, found = examined(data)
    right = pipeline is not None and not found and pipeline.spec == spec
    return pipeline if right else None


def _of_the_model(spec: ModelSpec) -> dict[str, Any]:
    """Fields of the spec that only `arch.model` can say."""
    data = said(spec)
    own = {name: value for name, value in data.items() if name not in OF_THE_STREAM}
    own.pop("stem")
    if spec.norm not in NAMES:
        own["norm"] = spec.norm
    stem = spec.stem
    if isinstance(stem, Tokens) and stem.max_positions is not None:
        own["stem"] = stem.to_dict()
    return {"model": own} if own else {}


def _named(stacks: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Modules, equal ones once, and the stages that they stand in."""
    modules: dict[str, Any] = {}
    stages = []
    for i, stack in enumerate(stacks):
        name = next((n for n, known in modules.items() if known == stack), f"layers_{i}")
        modules.setdefault(name, stack)
        stage = f"stage_{i}" if name != f"layers_{i}" else name
        stages.append({"name": stage, **({} if stage == name else {"module": name})})
    return {"modules": modules}, {"pipeline": stages}


def _stacks(runs: list[list[Any]], d_model: int, ctx_len: int) -> Iterator[dict[str, Any]]:
    """Every run of equal layers as a module."""
    for run in runs:
        words = next(_worded(run, d_model, ctx_len), None)
        layers = [said(layer) for layer in run] if words is None else []
        yield words or {"kind": "custom", "params": {"layers": layers}}


def _worded(run: list[Any], d_model: int, ctx_len: int) -> Iterator[dict[str, Any]]:
    """Ways to say a run of equal blocks that compile to it, the most telling first."""
    if not isinstance(run[0], BlockSpec) or run[0].norm not in NAMES:
        return
    for mixer, around in _mixers(run[0].mixer):
        for ffn in _channels(run[0].channel, d_model):
            words = {"kind": "transformer", "n_layers": len(run), **mixer, **ffn, **around}
            words |= {"norm": NAMES[run[0].norm], **_residual(run[0])}
            if _layers(words, d_model, ctx_len) == run:
                yield words


def _layers(words: Mapping[str, Any], d_model: int, ctx_len: int) -> list[Any] | None:
    """What a module compiles to; None if it does not fit."""
    findings = Findings()
    arch = {"d_model": d_model, **{k: v for k, v in words.items() if k in STACK}}
    document = read({"arch": arch, "train": {"ctx_len": ctx_len}}, findings)
    if document is None or findings:
        return None
    layers = layers_of(document.arch, Frame("arch", document.arch, ctx_len), findings)
    return None if findings else layers


def _residual(block: BlockSpec) -> dict[str, Any]:
    if block.norm_at == "pre" and block.residual_scale == 1:
        return {}
    if block.norm_at == "post" and block.residual_scale == 1:
        return {"residual": {"kind": "deepnet", "scale": block.stream_scale}}
    norms = {"pre_ln": block.norm_at != "post", "post_ln": block.norm_at != "pre"}
    return {"residual": {"kind": "dual", **norms, "scale": block.residual_scale}}


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
    pos = next((p for spec in specs if (p := _positions(spec.to_dict()))), {})
    kv = next((p for spec in specs if (p := _cache(spec.to_dict()))), {})
    words = [_words(spec) for spec in specs]
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
        found["softmax"] = _given(softmax) or None
        found["value_glu"] = data["value_glu"] or None
        if data["qkv_rank"] is not None:
            low = {"type": "low_rank", "rank": data["qkv_rank"], "shared": data["qkv_shared"]}
            found["projection"] = low
        return {"kind": "Attention", **_given(found)}
    if spec.kind == "kernel_attention":
        kernel = {"name": data["feature"], "features": data["n_features"]}
        kernel |= {"orthogonal": data["orthogonal"], "redraw": data["redraw"]}
        found = {"heads": data["n_heads"], "head_dim": data["head_dim"]}
        return {
            "kind": "Attention",
            **_given(found),
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


def _positions(data: Mapping[str, Any]) -> dict[str, Any]:
    if data["kind"] != "attention":
        return {}
    names = {"relative": "relbias"}
    pos: dict[str, Any] = {"kind": names.get(data["position"], data["position"])}
    if data["position"] in ROTATED:
        scaling, stretch = data["rope_scaling"], None
        if scaling is not None:
            numbers = {"divisors": scaling["divisors"]} if scaling["divisors"] else None
            stretch = {"type": scaling["method"], "factor": scaling["factor"]}
            stretch |= {"original_context": scaling["original_context"], "longrope": numbers}
            stretch = _given(stretch)
        rope = {"theta": data["rope_theta"], "dims": data["rope_dims"], "scaling": stretch}
        pos["rope"] = _given(rope)
    return {"pos": pos} if pos["kind"] != "none" else {}


def _cache(data: Mapping[str, Any]) -> dict[str, Any]:
    quant = data.get("kv_quant", "none")
    return {} if quant == "none" else {"kv_policy": {"cache": "full", "quant": quant}}


def _channels(spec: Any, d_model: int) -> Iterator[dict[str, Any]]:
    if spec is None:
        yield {}
        return
    data = spec.to_dict()
    gates = {gate: name for name, gate in GATES.items()}
    mult = None if data.get("hidden") is None else data["hidden"] / d_model
    if spec.kind == "mlp":
        yield {"ffn": _given({"kind": "dense", "mult": mult, "act": data["activation"]})}
    if spec.kind == "swiglu" and data["activation"] in gates:
        yield {"ffn": _given({"kind": "dense", "mult": mult, "act": gates[data["activation"]]})}
    if spec.kind == "moe":
        found = {"mult": mult, "act": "swiglu", "experts": data["n_experts"]}
        found |= {"topk": data["top_k"], "capacity": data["capacity_factor"] or None}
        yield {"ffn": _given({"kind": "moe", **found})}
    yield {"ffn": _own(spec)}


def _given(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if value is not None}
