"""Attention with a compressed cache: multi-head latent attention.

`kv_policy: {cache: latent, latent: {dim: 64}}` keeps `dim` numbers of a token, of which every head
makes its keys and values, and beside them the rotated entries, which all heads share: half of a
head, or `pos.rope.dims`. `heads` parts the numbers, and every head reads one part. `update: {kind:
ema, tau: 0.9, freq: 4}` keeps a latent of every fourth token: a mean of the tokens so far, in which
each one weighs tau times what its successor does. See `models.attention.summaries`.

Source: DeepSeek-AI 2024, arXiv:2405.04434, section 2.1.
"""

from __future__ import annotations

from typing import Any

from kizzasi.nas.pipelines.compiling.place import Place, heads_of
from kizzasi.nas.pipelines.compiling.stretching import stretched
from kizzasi.nas.pipelines.misfits import DROP, Findings
from kizzasi.nas.pipelines.parts import KVPolicy, LatentCache, Mixer, Softmax, Update

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
    scaling = None if rope is None else rope.scaling
    scale = None if m.softmax is None else m.softmax.qk_scale
    return {
        "kind": "mla",
        "n_heads": heads,
        **_latents(kv, heads, head_dim, where, findings),
        "qk_nope_head_dim": head_dim - n_rotated,
        "qk_rope_head_dim": n_rotated,
        "v_head_dim": head_dim,
        "rope_theta": None if rope is None else rope.theta,
        "rope_scaling": stretched(
            scaling, n_rotated, place, f"{place.pos_path}.rope.scaling", findings
        ),
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


def _latents(
    kv: KVPolicy, heads: int, head_dim: int, path: str, findings: Findings
) -> dict[str, Any]:
    """What is kept of which tokens, and in how many parts."""
    latent, where = kv.latent or LatentCache(), f"{path}.latent"
    rank, parts = latent.dim, latent.heads or 1
    if rank is None:
        rank = findings.set(f"{where}.dim", "'latent' needs it", 2 * head_dim)
    if heads % parts or rank % parts:
        rule = f"{parts} parts of {rank} numbers are not read by equally many of {heads} heads"
        near = max(n for n in range(1, parts + 1) if heads % n == 0 and rank % n == 0)
        parts = findings.set(f"{where}.heads", rule, near)
    return {
        "kv_lora_rank": rank,
        "n_latents": parts,
        **_update(latent.update, f"{where}.update", findings),
    }


def _update(update: Update | None, path: str, findings: Findings) -> dict[str, Any]:
    """How summaries fade, and of how many tokens one is kept."""
    if update is None:
        return {}
    if update.kind == "linear":
        if update.tau is not None:
            findings.drop(f"{path}.tau", "'linear' fades nothing")
        if update.freq not in (None, 1):
            findings.drop(f"{path}.freq", "'linear' keeps a latent of every token", "give 'ema'")
        return {}
    fade = update.tau
    if fade is None or not 0 <= fade < 1:
        rule = "'ema' needs it" if fade is None else f"{fade} of 'ema' is outside [0, 1)"
        fade = findings.set(f"{path}.tau", rule, 0.9)
    return {"fade": fade, "every": update.freq}
