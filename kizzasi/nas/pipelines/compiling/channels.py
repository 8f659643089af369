"""Feed-forward parts and norms of a document as those of the house."""

from __future__ import annotations

from typing import Any

from kizzasi.models import ChannelSpec
from kizzasi.nas.pipelines.misfits import Findings
from kizzasi.nas.pipelines.parts import FFN, Own, Residual

OWN_NORMS = ("layer_unbiased", "rms_plus_one")
NORMS = {"LayerNorm": "layer", "RMSNorm": "rms", "ScaleNorm": "scale"}
NORMS |= {kind: kind for kind in OWN_NORMS}
GATES = {"swiglu": "silu", "geglu": "gelu"}
OF_MOE = ("experts", "topk", "capacity")


def channel_of(ffn: FFN | Own, d_model: int, path: str, findings: Findings) -> ChannelSpec:
    """A feed-forward part."""
    if isinstance(ffn, Own):
        assert isinstance(ffn.spec, ChannelSpec)
        return ffn.spec
    act = ffn.act
    if act is None:
        act = findings.set(f"{path}.act", "it is needed", "gelu")
    hidden = None if ffn.mult is None else max(1, round(ffn.mult * d_model))
    one = _dense(act, hidden)
    if ffn.kind == "dense":
        for name in OF_MOE:
            if getattr(ffn, name) is not None:
                findings.drop(f"{path}.{name}", "'dense' has no experts")
        return ChannelSpec.from_dict(one)
    experts, top_k = ffn.experts, ffn.topk
    if experts is None:
        experts = findings.set(f"{path}.experts", "'moe' needs it", 4)
    if top_k is None:
        top_k = findings.set(f"{path}.topk", "'moe' needs it", min(2, experts))
    if top_k > experts:
        top_k = findings.set(f"{path}.topk", f"{top_k} of {experts} experts", experts)
    data: dict[str, Any] = {"kind": "moe", "n_experts": experts, "top_k": top_k}
    data |= {"hidden": hidden} if act == "swiglu" else {"experts": [one] * experts}
    return ChannelSpec.from_dict({**data, "capacity_factor": ffn.capacity or 0.0})


def _dense(act: str, hidden: int | None) -> dict[str, Any]:
    if act in GATES:
        return {"kind": "swiglu", "hidden": hidden, "activation": GATES[act]}
    return {"kind": "mlp", "hidden": hidden, "activation": act}


def residual_of(residual: Residual | None, path: str, findings: Findings) -> dict[str, Any]:
    """The fields of a block that say where its norms and branches stand."""
    if residual is None:
        return {}
    beside = {} if residual.beside is None else {"parallel": residual.beside}
    return {**_norms(residual, path, findings), **beside}


def _norms(residual: Residual, path: str, findings: Findings) -> dict[str, Any]:
    if residual.kind == "single":
        for name in ("pre_ln", "post_ln", "scale"):
            if getattr(residual, name) is not None:
                findings.drop(f"{path}.{name}", "'single' norms what a branch reads")
        return {}
    if residual.kind == "deepnet":
        for name in ("pre_ln", "post_ln"):
            if getattr(residual, name) is not None:
                findings.drop(f"{path}.{name}", "'deepnet' norms what a branch adds")
        scale = residual.scale
        if scale is None:
            scale = findings.set(f"{path}.scale", "'deepnet' needs it", 1.0)
        return {"norm_at": "post", "stream_scale": scale}
    where = (residual.pre_ln, residual.post_ln)
    if None in where or where == (False, False):
        rule = f"'dual' with pre_ln {where[0]} and post_ln {where[1]} leaves no norm, or says none"
        findings.add(
            path,
            rule,
            "give both, at least one of them true",
            (f"{path}.pre_ln", True),
            (f"{path}.post_ln", True),
        )
        where = (True, True)
    at = {(True, True): "both", (True, False): "pre", (False, True): "post"}[where]  # pyright: ignore
    return {"norm_at": at, "residual_scale": residual.scale or 1.0}


def norm_of(norm: str | None, path: str, findings: Findings) -> Any:
    """The house's name of a norm."""
    if norm is None:
        findings.set(path, "it is needed", "RMSNorm")
    return NORMS[norm or "RMSNorm"]
