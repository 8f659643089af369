"""Products of chunks: the walk of a memory from chunk to chunk, and sums of matrix products.

Symbols as in scores.py; m channels of a value, S (n, m) memory, indexed [key, value].

Rows of tokens after the last one are never read.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def walk(
    s0_,
    fade_,
    write_,
    v_,
    forget_,
    reader_,
    own_,
    u_,
    memory_,
    last_,
    t,
    h,
    n,
    m,
    z,
    v_b,
    v_t,
    v_h,
    LOOKUP: tl.constexpr,
    ONE: tl.constexpr,
    REVERSE: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Chunk by chunk, from the last one where REVERSE:

        u = own + reader S;    S = fade S + write^T v + forget^T u

    the former where LOOKUP. memory (b h, z, n, m) is what each chunk is entered with; write, forget
    and reader (b h, z, C, n), own and u (b h, z, C, m), v (b, t, h, m). A program is one head of
    one row and BM channels of the value.
    """
    item = tl.program_id(0).to(tl.int64)
    row, head = item // h, item % h
    c, i = tl.arange(0, C), tl.arange(0, N)
    j = tl.program_id(1) * BM + tl.arange(0, BM)
    in_n, in_m = i < n, j < m
    both = in_n[:, None] & in_m[None, :]
    inner = i[:, None] * m + j[None, :]
    S = tl.load(s0_ + item * n * m + inner, both, 0.0)
    v_ += row * v_b + head * v_h + j[None, :]
    for step in range(z):
        chunk = step
        if REVERSE:
            chunk = z - 1 - step
        place = item * z + chunk
        there = chunk * C + c < t
        keys = (place * C + c[:, None]) * n + i[None, :]
        columns = (place * C + c[None, :]) * n + i[:, None]
        tl.store(memory_ + place * n * m + inner, S, both)
        if ONE:
            fade = tl.load(fade_ + place)
        else:
            fade = tl.load(fade_ + place * n + i, in_n, 0.0)[:, None]
        value = there[:, None] & in_m[None, :]
        v = tl.load(v_ + (chunk * C + c[:, None]) * v_t, value, 0.0)
        write = tl.load(write_ + columns, in_n[:, None] & there[None, :], 0.0)
        new = tl.dot(write, v, fade * S, input_precision=PRECISION, out_dtype=S.dtype)
        if LOOKUP:
            at = (place * C + c[:, None]) * m + j[None, :]
            reader = tl.load(reader_ + keys, there[:, None] & in_n[None, :], 0.0)
            u = tl.load(own_ + at, value, 0.0)
            u = tl.dot(reader, S, u, input_precision=PRECISION, out_dtype=S.dtype)
            tl.store(u_ + at, u, value)
            forget = tl.load(forget_ + columns, in_n[:, None] & there[None, :], 0.0)
            new = tl.dot(forget, u, new, input_precision=PRECISION, out_dtype=S.dtype)
        S = new
    tl.store(last_ + item * n * m + inner, S, both)


@triton.jit
def _term(
    sum,
    x_,
    y_,
    row,
    head,
    chunk,
    i,
    j,
    rows,
    columns,
    width,
    x_b,
    x_h,
    x_z,
    x_r,
    x_c,
    y_b,
    y_h,
    y_z,
    y_r,
    y_c,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    x_ += row * x_b + head * x_h + chunk * x_z
    y_ += row * y_b + head * y_h + chunk * y_z
    for first in range(0, width, BK):
        k = first + tl.arange(0, BK)
        at, there = i[:, None] * x_r + k[None, :] * x_c, rows[:, None] & (k < width)[None, :]
        x = tl.load(x_ + at, there, 0.0)
        at, there = k[:, None] * y_r + j[None, :] * y_c, (k < width)[:, None] & columns[None, :]
        y = tl.load(y_ + at, there, 0.0)
        sum = tl.dot(x, y, sum, input_precision=PRECISION, out_dtype=sum.dtype)
    return sum


@triton.jit
def summed_products(
    x1_,
    y1_,
    x2_,
    y2_,
    x3_,
    y3_,
    out_,
    t,
    h,
    width1,
    width2,
    width3,
    wide,
    x1_b,
    x1_h,
    x1_z,
    x1_r,
    x1_c,
    y1_b,
    y1_h,
    y1_z,
    y1_r,
    y1_c,
    x2_b,
    x2_h,
    x2_z,
    x2_r,
    x2_c,
    y2_b,
    y2_h,
    y2_z,
    y2_r,
    y2_c,
    x3_b,
    x3_h,
    x3_z,
    x3_r,
    x3_c,
    y3_b,
    y3_h,
    y3_z,
    y3_r,
    y3_c,
    out_b,
    out_h,
    out_z,
    out_r,
    out_c,
    TERMS: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = x1 y1 + x2 y2 + x3 y3 for every chunk of every head, as many as TERMS.

    Rows of x and out are tokens. Strides are of batch rows, heads, chunks, rows and columns. A
    width, of x's columns and y's rows, or of out's columns (wide), is 0 where they are tokens.
    """
    item, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = item // h, item % h
    i, j = tl.arange(0, C), tl.program_id(2) * BC + tl.arange(0, BC)
    tokens = tl.minimum(t - chunk * C, C)
    rows = i < tokens
    columns = j < tl.where(wide == 0, tokens, wide)
    sum = tl.zeros((C, BC), out_.dtype.element_ty)
    sum = _term(
        sum,
        x1_,
        y1_,
        row,
        head,
        chunk,
        i,
        j,
        rows,
        columns,
        tl.where(width1 == 0, tokens, width1),
        x1_b,
        x1_h,
        x1_z,
        x1_r,
        x1_c,
        y1_b,
        y1_h,
        y1_z,
        y1_r,
        y1_c,
        BK,
        PRECISION,
    )
    if TERMS > 1:
        sum = _term(
            sum,
            x2_,
            y2_,
            row,
            head,
            chunk,
            i,
            j,
            rows,
            columns,
            tl.where(width2 == 0, tokens, width2),
            x2_b,
            x2_h,
            x2_z,
            x2_r,
            x2_c,
            y2_b,
            y2_h,
            y2_z,
            y2_r,
            y2_c,
            BK,
            PRECISION,
        )
    if TERMS > 2:
        sum = _term(
            sum,
            x3_,
            y3_,
            row,
            head,
            chunk,
            i,
            j,
            rows,
            columns,
            tl.where(width3 == 0, tokens, width3),
            x3_b,
            x3_h,
            x3_z,
            x3_r,
            x3_c,
            y3_b,
            y3_h,
            y3_z,
            y3_r,
            y3_c,
            BK,
            PRECISION,
        )
    out_ += row * out_b + head * out_h + chunk * out_z
    tl.store(out_ + i[:, None] * out_r + j[None, :] * out_c, sum, rows[:, None] & columns[None, :])
