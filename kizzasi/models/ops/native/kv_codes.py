"""Keys and values of their codes in C, into memory that is there; kv.c says how."""

from __future__ import annotations

from torch import Tensor

from kizzasi.models.ops import kv_codes as torch_form
from kizzasi.models.ops.kv_codes import KVQuant, groups_of, pairs
from kizzasi.models.ops.native import library


def decode_into(out: Tensor, codes: Tensor, scale: Tensor, kind: KVQuant) -> None:
    """As of kv_codes; fp8, and heads of an odd width or of unequal groups, are the torch form's."""
    n, size = groups_of(out.shape[-1])
    if kind == "fp8" or n * size != out.shape[-1]:
        return torch_form.decode_into_ref(out, codes, scale, kind)
    scale = scale.to(out.dtype).contiguous()
    table = pairs(out.device, out.dtype)
    _call("kv_tokens", out, codes, scale, table, size, kind)


def decode_channels_into(
    out: Tensor, codes: Tensor, step: Tensor, least: Tensor, kind: KVQuant
) -> None:
    """As of kv_codes."""
    n = codes.shape[2] // step.shape[2]
    step, least = step.to(out.dtype).contiguous(), least.to(out.dtype).contiguous()
    _call("kv_channels", out, codes, step, least, n, kind)


def _call(
    name: str, out: Tensor, codes: Tensor, scale: Tensor, extra: Tensor, n: int, kind: KVQuant
) -> None:
    b, h, s, width = out.shape
    even = 1 in (b, h) or h * codes.stride(1) == codes.stride(0)
    codes = codes if even and codes[0, 0].is_contiguous() else codes.contiguous()
    row = codes.stride(0 if h == 1 else 1)
    assert out[0, 0].is_contiguous(), "heads lie in one piece each"
    assert b == 1 or out.stride(0) == h * out.stride(1), "and so far from one another"
    sizes = [b * h, s, n, width, codes.shape[-1], row, scale.stride(1), out.stride(1)]
    threads = library.threads(out.numel())
    library.call(name, out.dtype, [codes, scale, out, extra], *sizes, int(kind == "nf4"), threads)
