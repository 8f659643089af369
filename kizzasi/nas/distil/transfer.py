"""What a new mixer takes from the one whose place it gets: heads of queries, keys, values, output.

A linear attention is softmax attention without the softmax, and a state space reads its state as
attention reads values: C asks as queries do, B is a key, x a value. So a new mixer need not begin
at random (Wang et al. 2024, arXiv:2408.15237, section 2.2).

| here | attention, gla, retention | mamba2 | short_conv |
|---|---|---|---|
| q, k | rows of q_proj, k_proj | C, B of in_proj | none |
| v | rows of v_proj | x of in_proj | x of in_proj |
| o | columns of o_proj | out_proj | out_proj |

Where there are more heads, each serves several in a row; where there are fewer, they are means of
those that they replace (Ainslie et al. 2023, arXiv:2305.13245, section 2.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kizzasi.models import Mixer, MixerSpec

Heads = Mapping[str, Tensor]  # by q, k, v, o: views (heads, width, d), or (channels, d) of none
Read = Callable[[Any, Mapping[str, Tensor]], Heads]
READERS: dict[str, Read] = {}


def heads_of(kind: str, read: Read) -> None:
    """Say where the mixers of a kind hold what others can take, or take from others.

    Args:
        kind: of the spec.
        read: from the spec and the parameters by name to views (heads, width, d) by the names q, k,
            v and o, as many as there are; what is written into a view changes the parameter.
    """
    READERS[kind] = read


@torch.no_grad()
def transfer(new: Mixer, spec: MixerSpec, old: Mixer, old_spec: MixerSpec) -> int:
    """Write into a new mixer what fits of an old one.

    Of a mixer of the same kind every parameter of the same name and shape; then the heads by the
    table above, where their widths agree. Everything else stays as it began.

    Args:
        new, spec: whose parameters are written to.
        old, old_spec: stays as it is.

    Returns:
        How many values were taken.
    """
    ours, theirs = (_parameters(mixer) for mixer in (new, old))
    taken, left = 0, set(ours)
    for name in ours.keys() & theirs.keys() if spec.kind == old_spec.kind else ():
        if ours[name].shape == theirs[name].shape:
            ours[name].copy_(theirs[name])
            left.discard(name)
            taken += ours[name].numel()
    if not left or spec.kind not in READERS or old_spec.kind not in READERS:
        return taken
    to, source = READERS[spec.kind](spec, ours), READERS[old_spec.kind](old_spec, theirs)
    done = {_place(ours[name]) for name in ours.keys() - left}
    for name in to.keys() & source.keys():
        given = _fitted(source[name], len(source["o"]) if to[name].ndim == 2 else len(to[name]))
        given = given.flatten(0, 1) if given is not None and to[name].ndim == 2 else given
        if given is not None and given.shape == to[name].shape and _place(to[name]) not in done:
            to[name].copy_(given)
            taken += given.numel()
    return taken


@torch.no_grad()
def calibrate(mixer: Mixer, spec: MixerSpec, x: Tensor, y: Tensor) -> None:
    """Give the output of a new mixer the size of what it is to put out, by its output projection.

    The factor is that of least squares, <y, y'> / <y', y'>, but at least a tenth of |y| / |y'|, so
    that gradients pass. Kinds without a place in the table above stay as they are.

    Args:
        mixer, spec: whose output y' is looked at.
        x, y: (b, t, d) what it reads, and what it should put out.
    """
    heads = READERS[spec.kind](spec, _parameters(mixer)) if spec.kind in READERS else {}
    if "o" not in heads:
        return
    out, wanted = mixer(x.float()).y.double(), y.double()
    norm, like = out.norm().item(), (out * wanted).sum().item()
    if norm > 0:
        heads["o"].mul_(max(like / norm**2, 0.1 * wanted.norm().item() / norm))


def _parameters(mixer: Mixer) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in mixer.named_parameters()}


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _fitted(heads: Tensor, n: int) -> Tensor | None:
    """n heads of some (h, width, d); None where neither number divides the other."""
    h = len(heads)
    if heads.ndim == 2:
        return None
    if n % h == 0:
        return heads.repeat_interleave(n // h, 0)
    return heads.unflatten(0, (n, h // n)).mean(1) if h % n == 0 else None


def _attention(spec: Any, p: Mapping[str, Tensor]) -> Heads:
    """Of one with gates or a bottleneck the rows of q_proj mean something else."""
    plain = not spec.gate and spec.qkv_rank is None
    return _projections(p, spec.n_heads, spec.kv_heads) if plain else {}


def _linear_attention(spec: Any, p: Mapping[str, Tensor]) -> Heads:
    return _projections(p, spec.n_heads, spec.n_heads)


def _projections(p: Mapping[str, Tensor], n_heads: int, n_kv_heads: int) -> Heads:
    rows = {"q": n_heads, "k": n_kv_heads, "v": n_kv_heads}
    named = {name: (p.get(f"{name}_proj.weight"), h) for name, h in rows.items()}
    found = {name: w.unflatten(0, (h, -1)) for name, (w, h) in named.items() if w is not None}
    return {**found, "o": p["o_proj.weight"].T.unflatten(0, (n_heads, -1))}


def _mamba2(spec: Any, p: Mapping[str, Tensor]) -> Heads:
    into, out = p["in_proj.weight"], p["out_proj.weight"]
    inner, g, states = out.shape[1], spec.n_groups, spec.n_groups * spec.d_state
    x, B, C = into[inner : 2 * inner + 2 * states].split([inner, states, states])
    return {
        "v": x.unflatten(0, (-1, spec.head_dim)),
        "k": B.unflatten(0, (g, -1)),
        "q": C.unflatten(0, (g, -1)),
        "o": out.T.unflatten(0, (-1, spec.head_dim)),
    }


def _short_conv(spec: Any, p: Mapping[str, Tensor]) -> Heads:
    return {"v": p["in_proj.weight"].chunk(3)[2], "o": p["out_proj.weight"].T}


heads_of("attention", _attention)
heads_of("gla", _linear_attention)
heads_of("retention", _linear_attention)
heads_of("mamba2", _mamba2)
heads_of("short_conv", _short_conv)
