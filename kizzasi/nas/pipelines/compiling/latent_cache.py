"""Attention with a compressed cache: multi-head latent attention.

`kv_policy: {cache: latent, latent: {dim: 64}}` keeps `dim` numbers of a token, of which every head
makes its keys and values, and beside them the rotated entries, which all heads share: half of a
head, or `pos.rope.dims`.

Source: DeepSeek-AI 2024, arXiv:2405.04434, section 2.1.
"""

from __future__ import annotations

from typing import Any

from kizzasi.nas.pipelines.compiling.place import Place, heads_of
from kizzasi.nas.pipelines.misfits import DROP, Findings
from kizzasi.nas.pipelines.parts import KVPolicy, LatentCache, Mixer, Softmax

ROTATES = ("rope", "none")


def latent_attention(
    m: Mixer, place: Place, path: str, findings: Findings
) -> dict[str, Any] | None:
    """The fields of the mixer; None where attention keeps keys and values, which is then found."""
    kv, where = place.kv, place.kv_path
    assert kv is not None, "asked"
    heads = heads_of(m, place.d_model, 1, path, findings)
    head_dim = m.head_dim or place.d_model // heads
    rule = _misfit(m, place, head_dim, path)
    if rule is not None:
        changes = (f"{where}.cache", "full"), (f"{where}.latent", DROP)
        findings.add(f"{where}.cache", rule, "give 'full'", *changes)
        return None
    if m.groups is not None:
        findings.drop(f"{path}.groups", "of a latent every head makes keys and values of its own")
    for name in ("window", "group", "evict"):
        if getattr(kv, name) is not None:
            findings.drop(f"{where}.{name}", "a cache 'latent' does not read it")
    rope = None if place.pos is None or place.pos.kind == "none" else place.pos.rope
    n_rotated = _rotated(rope and rope.dims, head_dim, f"{place.pos_path}.rope.dims", findings)
    scale = None if m.softmax is None else m.softmax.qk_scale
    return {
        "kind": "mla",
        "n_heads": heads,
        "kv_lora_rank": _rank(kv, head_dim, where, findings),
        "qk_nope_head_dim": head_dim - n_rotated,
        "qk_rope_head_dim": n_rotated,
        "v_head_dim": head_dim,
        "rope_theta": None if rope is None else rope.theta,
        "position": "rope" if _position(m, place) == "rope" else "none",
        "kv_quant": kv.quant,
        "scale": scale if isinstance(scale, float) else None,
    }


def _position(m: Mixer, place: Place) -> str:
    return m.pos or ("none" if place.pos is None else place.pos.kind)


def _misfit(m: Mixer, place: Place, head_dim: int, path: str) -> str | None:
    """Why this attention has no latent."""
    for name in ("stencil", "projection", "value_glu"):
        value = getattr(m, name)
        if value and getattr(value, "kind", getattr(value, "type", "")) not in ("full", "none"):
            return f"attention that makes keys of a latent has no {name}, which {path} gives"
    known = Softmax(qk_scale=None if m.softmax is None else m.softmax.qk_scale)
    if m.softmax is not None and m.softmax not in (known, Softmax(type="standard")):
        return f"attention that makes keys of a latent scales its scores and no more; see {path}"
    if _position(m, place) not in ROTATES:
        return f"attention that makes keys of a latent has no positions {_position(m, place)!r}"
    if place.pos is not None and place.pos.rope is not None and place.pos.rope.scaling is not None:
        return "the positions of attention that makes keys of a latent are not stretched here"
    if head_dim < 3:
        return f"a head of {head_dim} entries has none to rotate beside those of a latent"
    return None


def _rotated(dims: int | None, head_dim: int, path: str, findings: Findings) -> int:
    """Entries of a head that are rotated, and shared by all heads."""
    usual = max(2, head_dim // 4 * 2)
    if dims is None or (dims < head_dim and dims % 2 == 0):
        return usual if dims is None else dims
    rule = f"{dims} of the {head_dim} entries of a head, of which a latent makes some"
    return findings.set(path, rule, usual)


def _rank(kv: KVPolicy, head_dim: int, path: str, findings: Findings) -> int:
    """Numbers that are kept of a token."""
    latent = kv.latent or LatentCache()
    rank = latent.dim
    if rank is None:
        rank = findings.set(f"{path}.latent.dim", "'latent' needs it", 2 * head_dim)
    if latent.heads not in (None, 1):
        findings.drop(f"{path}.latent.heads", "every head reads the whole latent")
    update, where = latent.update, f"{path}.latent.update"
    if update is not None and update.kind == "ema":
        rule = "'ema': a latent is of its own token; a past that fades is cond.source's"
        findings.set(f"{where}.kind", rule, "linear")
    if update is not None and update.freq not in (None, 1):
        findings.drop(f"{where}.freq", "every token has a latent of its own")
    if update is not None and update.tau is not None:
        findings.drop(f"{where}.tau", "'linear' fades nothing")
    return rank
