"""Attention to codes in C, which are never written out; kv.c says how."""

from __future__ import annotations

from torch import Tensor

from kizzasi.models.ops import coded_attention as torch_form
from kizzasi.models.ops.coded_attention import Coded, done_of
from kizzasi.models.ops.kv_codes import KVQuant, groups_of, pairs, scale_dtype
from kizzasi.models.ops.native import library

TOKENS = 32  # as in kv.c


def coded_attention(q: Tensor, coded: Coded, s: int, kind: KVQuant) -> Tensor:
    """As of ops/coded_attention; fp8, half precision, and heads of an odd width or of unequal parts
    are the torch form's."""
    b, h, queries, width = q.shape
    n, part = groups_of(width)
    if kind == "fp8" or n * part != width or q.dtype not in library.REALS:
        return torch_form.coded_attention(q, coded, s, kind)
    done, dtype = done_of(coded, s), q.dtype
    exact = [x if x is None else x.to(dtype).contiguous() for x in coded[5:]]
    made = scale_dtype(dtype)
    scale, v_scale = (x.to(made).contiguous() for x in (coded.k_scale, coded.v_scale))
    least = None if coded.k_least is None else coded.k_least.to(made).contiguous()
    k, v = coded.k.contiguous(), coded.v.contiguous()
    q, y = q.contiguous(), q.new_empty(q.shape)
    work = q.new_empty(b * h * (TOKENS * width + queries * s))
    table = pairs(q.device, dtype) if kind == "nf4" else None
    slots, groups = k.shape[2], scale.shape[2]
    group = 0 if coded.k_open is None else coded.k_open.shape[2]
    sizes = [b * h, queries, width, done, s - done, min(coded.k_first.shape[2], s), group, part]
    sizes += [k.shape[3], slots, groups, group, coded.k_first.shape[2], int(kind == "nf4")]
    tensors = [k, scale, least, v, v_scale, *exact, q, y, work, table]
    library.call("kv_attend", dtype, tensors, *sizes, library.threads(b * h * s * width * queries))
    return y
