"""What the tokens of a chunk see of each other through a memory that fades between them.

b batch · t time · h heads · n channels of a key · C tokens of a chunk, a power of two · z chunks

    A[i, j] = sum_n x[i, n] exp(w[j+1, n] + .. + w[i, n]) y[j, n],      j <= i

for queries x and keys y; a query that reads before the present token fades and writes ("strict")
sees j < i, through w[i-1]. A start is a decay of FORGET that lies before the token.

Every exponent is a sum of decays and never a difference: nothing cancels, and nothing overflows.
With one decay a head, the sums are made for all pairs. With one a channel, neighbouring blocks of
1, 2, 4, .. tokens are joined until one is left: scores across a joint are one product of queries
faded since the joint and keys faded until it, of which the pairs across joints of that size are
kept. log2(C) products on tensor cores take the place of C^2 n exponentials.

A program is one chunk of one head of one batch row.
"""

from __future__ import annotations

import triton
import triton.language as tl

FORGET = tl.constexpr(-1e4)  # exp of it, and of anything below, is zero in float64


@triton.jit
def _decays(w_, at, inside):
    w = tl.load(w_ + at, inside, 0.0)
    return tl.where(w < FORGET, FORGET, w)


@triton.jit
def _resets(starts_, row, s, inside, t, like, PACKED: tl.constexpr):
    """(C,) FORGET where the memory is emptied before the token."""
    reset = tl.zeros_like(like)
    if PACKED:
        first = tl.load(starts_ + row * t + s, inside & (s < t), 0) != 0
        reset = tl.where(first, FORGET, 0.0).to(like.dtype)
    return reset


@triton.jit
def _fades_of_head(w_, starts_, row, s, i, t, w_t, PACKED: tl.constexpr, C: tl.constexpr):
    """Of one decay a head: exp of the sums between all pairs, late (C, C) and strict; since the
    chunk's start, late (C,) and strict; until its end (C,); over the whole."""
    w = _decays(w_, s * w_t, s < t)
    before = _decays(w_, (s - 1) * w_t, (i > 0) & (s <= t))
    after = _decays(w_, (s + 1) * w_t, (i < C - 1) & (s + 1 < t))
    reset = _resets(starts_, row, s, i >= 0, t, w, PACKED)
    after += _resets(starts_, row, s + 1, i < C - 1, t, w, PACKED)
    sees, strictly = i[:, None] >= i[None, :], i[:, None] > i[None, :]
    own = tl.where(strictly, (w + reset)[:, None], 0.0)
    late = tl.where(sees, tl.exp(tl.cumsum(own, 0)), 0.0)
    own = tl.where(strictly, reset[:, None], 0.0)
    own += tl.where((i - 1)[:, None] > i[None, :], before[:, None], 0.0)
    strict = tl.where(strictly, tl.exp(tl.cumsum(own, 0)), 0.0)
    since, since_strict = tl.exp(tl.cumsum(w + reset, 0)), tl.exp(tl.cumsum(before + reset, 0))
    until = tl.exp(tl.cumsum(after, 0, reverse=True))
    return late, strict, since, since_strict, until, tl.exp(tl.sum(w + reset, 0))


@triton.jit
def _swapped(x, L):
    """Rows in blocks of L, each swapped with its neighbour."""
    i = (tl.arange(0, x.shape[0]) ^ L)[:, None]
    return tl.gather(x, tl.broadcast_to(i, x.shape), 0)


@triton.jit
def scores_forward(
    q_,
    k_,
    a_,
    b_,
    w_,
    starts_,
    A_,
    seen_,
    fade_,
    t,
    h,
    n,
    shared,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    a_b,
    a_t,
    a_h,
    b_b,
    b_t,
    b_h,
    w_b,
    w_t,
    w_h,
    LOOKUP: tl.constexpr,
    EARLY: tl.constexpr,
    ONE: tl.constexpr,
    PACKED: tl.constexpr,
    LEVELS: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A (qk, qb, ak, ab; b h, z, C, C), the last three where LOOKUP; seen (q, k, a, b; b h, z, C,
    n): queries faded since the chunk's start, and keys until its end; fade (b h, z, n or 1)."""
    item, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head, z = item // h, item % h, tl.num_programs(1)
    dtype: tl.constexpr = A_.dtype.element_ty
    i = tl.arange(0, C)
    s = chunk * C + i
    w_ += row * w_b + head * w_h
    q_ += row * q_b + head // shared * q_h
    k_ += row * k_b + head // shared * k_h
    a_ += row * a_b + head * a_h
    b_ += row * b_b + head * b_h
    place = item * z + chunk
    part = tl.num_programs(0).to(tl.int64) * z * C
    qk = tl.zeros((C, C), dtype)
    qb, ak, ab = qk, qk, qk
    if ONE:
        late, strict, since, since_strict, until, whole = _fades_of_head(
            w_, starts_, row, s, i, t, w_t, PACKED, C
        )
        if EARLY:
            late, since = strict, since_strict
        tl.store(fade_ + place, whole)
    for first in range(0, n, BN):
        j = first + tl.arange(0, BN)
        inside = (s < t)[:, None] & (j < n)[None, :]
        at = (place * C + i[:, None]) * n + j[None, :]
        q = tl.load(q_ + s[:, None] * q_t + j[None, :], inside, 0.0)
        k = tl.load(k_ + s[:, None] * k_t + j[None, :], inside, 0.0)
        a, b = q, k
        if LOOKUP:
            a = tl.load(a_ + s[:, None] * a_t + j[None, :], inside, 0.0)
            b = tl.load(b_ + s[:, None] * b_t + j[None, :], inside, 0.0)
        if ONE:
            qk = tl.dot(q, tl.trans(k), qk, input_precision=PRECISION, out_dtype=dtype)
            if LOOKUP:
                qb = tl.dot(q, tl.trans(b), qb, input_precision=PRECISION, out_dtype=dtype)
                ak = tl.dot(a, tl.trans(k), ak, input_precision=PRECISION, out_dtype=dtype)
                ab = tl.dot(a, tl.trans(b), ab, input_precision=PRECISION, out_dtype=dtype)
            read, find, kept = since[:, None], since_strict[:, None], until[:, None]
        else:
            own = _decays(w_, s[:, None] * w_t + j[None, :], inside)
            strict = tl.zeros_like(own)
            strict += _resets(starts_, row, s, i >= 0, t, tl.sum(strict, 1), PACKED)[:, None]
            until, total = tl.zeros_like(own), own + strict
            if EARLY:
                own = tl.zeros_like(own)
            else:
                apart = i[:, None] == i[None, :]
                qk += tl.where(apart, tl.sum(q * k, 1)[:, None], 0.0)
                if LOOKUP:
                    qb += tl.where(apart, tl.sum(q * b, 1)[:, None], 0.0)
            for level in range(LEVELS):
                across = ((i[:, None] >> level) ^ (i[None, :] >> level)) == 1
                across = across & (i[:, None] > i[None, :])
                reads, writes = q * tl.exp(strict + own), tl.trans(k * tl.exp(until))
                qk += tl.where(across, tl.dot(reads, writes, input_precision=PRECISION), 0.0)
                if LOOKUP:
                    finds, forgets = a * tl.exp(strict), tl.trans(b * tl.exp(until))
                    qb += tl.where(across, tl.dot(reads, forgets, input_precision=PRECISION), 0.0)
                    ak += tl.where(across, tl.dot(finds, writes, input_precision=PRECISION), 0.0)
                    ab += tl.where(across, tl.dot(finds, forgets, input_precision=PRECISION), 0.0)
                other = _swapped(total, 1 << level)
                right = ((i >> level) & 1 == 1)[:, None]
                strict += tl.where(right, other, 0.0)
                until += tl.where(right, 0.0, other)
                total += other
            read, find, kept = tl.exp(strict + own), tl.exp(strict), tl.exp(until)
            whole = tl.exp(tl.sum(tl.where((i == 0)[:, None], total, 0.0), 0))
            tl.store(fade_ + place * n + j, whole, j < n)
        tl.store(seen_ + at, q * read, (j < n)[None, :])
        tl.store(seen_ + part * n + at, k * kept, (j < n)[None, :])
        if LOOKUP:
            tl.store(seen_ + 2 * part * n + at, a * find, (j < n)[None, :])
            tl.store(seen_ + 3 * part * n + at, b * kept, (j < n)[None, :])
    at = (place * C + i[:, None]) * C + i[None, :]
    if ONE:
        qk = qk * late
        if LOOKUP:
            qb, ak, ab = qb * late, ak * strict, ab * strict
    tl.store(A_ + at, qk)
    if LOOKUP:
        tl.store(A_ + part * C + at, qb)
        tl.store(A_ + 2 * part * C + at, ak)
        tl.store(A_ + 3 * part * C + at, ab)


@triton.jit
def solved(A_, T_, LEVELS: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """T (3; b h, z, C, C): the inverse of 1 - A_ab, it times A_ak, and A_qb times it.

    Blocks of 1, 2, 4, .. rows are joined: the inverse of [[P, 0], [-X, Q]] has Q^-1 X P^-1 below.
    """
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    part = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * C * C
    i = tl.arange(0, C)
    at = (place * C + i[:, None]) * C + i[None, :]
    A = tl.load(A_ + 3 * part + at)
    T = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(A.dtype)
    for level in range(LEVELS):
        across = ((i[:, None] >> level) ^ (i[None, :] >> level)) == 1
        X = tl.where(across & (i[:, None] > i[None, :]), A, 0.0)
        X = tl.dot(T, X, input_precision=PRECISION)
        T += tl.dot(X, T, input_precision=PRECISION)
    tl.store(T_ + at, T)
    ak = tl.load(A_ + 2 * part + at)
    tl.store(T_ + part + at, tl.dot(T, ak, input_precision=PRECISION))
    qb = tl.load(A_ + part + at)
    tl.store(T_ + 2 * part + at, tl.dot(qb, T, input_precision=PRECISION))


@triton.jit
def _sums(late, strict):
    """What each decay gets from the sums that it is a term of: late ones end at it or after it,
    strict ones after it."""
    return tl.cumsum(late + strict, 0, reverse=True) - strict


@triton.jit
def scores_backward(
    q_,
    k_,
    a_,
    b_,
    w_,
    starts_,
    dA_,
    dseen_,
    dfade_,
    dq_,
    dk_,
    da_,
    db_,
    dw_,
    t,
    h,
    n,
    shared,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    a_b,
    a_t,
    a_h,
    b_b,
    b_t,
    b_h,
    w_b,
    w_t,
    w_h,
    LOOKUP: tl.constexpr,
    EARLY: tl.constexpr,
    ONE: tl.constexpr,
    PACKED: tl.constexpr,
    LEVELS: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From dA, dseen and dfade, shaped as there: dq, dk, da, db (b, t, h, n), dw (b, t, h, n or 1).

    A factor exp(w[j+1] + .. + w[i]) is exp(P[i] - P[j]), of running sums P: what P[i] gets is
    x dx, and what P[j] gets is -y dy, without anything computed anew. A decay is a term of all
    later P.
    """
    item, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head, z = item // h, item % h, tl.num_programs(1)
    dtype: tl.constexpr = dA_.dtype.element_ty
    i = tl.arange(0, C)
    s = chunk * C + i
    w_ += row * w_b + head * w_h
    q_ += row * q_b + head // shared * q_h
    k_ += row * k_b + head // shared * k_h
    a_ += row * a_b + head * a_h
    b_ += row * b_b + head * b_h
    place = item * z + chunk
    part = tl.num_programs(0).to(tl.int64) * z * C
    pair = (s < t)[:, None] & (s < t)[None, :] & (i[:, None] >= i[None, :])
    at = (place * C + i[:, None]) * C + i[None, :]
    dqk = tl.load(dA_ + at, pair, 0.0)
    dqb, dak, dab = dqk, dqk, dqk
    if LOOKUP:
        dqb = tl.load(dA_ + part * C + at, pair, 0.0)
        dak = tl.load(dA_ + 2 * part * C + at, pair, 0.0)
        dab = tl.load(dA_ + 3 * part * C + at, pair, 0.0)
    zero = tl.sum(dqk, 1) * 0.0
    first_token = _resets(starts_, row, s, i >= 0, t, zero, PACKED) < 0.0
    late_sum, strict_sum, end_sum = zero, zero, tl.sum(zero, 0)
    if ONE:
        late, strict, since, since_strict, until, _ = _fades_of_head(
            w_, starts_, row, s, i, t, w_t, PACKED, C
        )
        if EARLY:
            late, since = strict, since_strict
        dqk, dqb, dak, dab = dqk * late, dqb * late, dak * strict, dab * strict
    for first in range(0, n, BN):
        j = first + tl.arange(0, BN)
        inside = (s < t)[:, None] & (j < n)[None, :]
        to = ((row * t + s[:, None]) * h + head) * n + j[None, :]
        at = (place * C + i[:, None]) * n + j[None, :]
        q = tl.load(q_ + s[:, None] * q_t + j[None, :], inside, 0.0)
        k = tl.load(k_ + s[:, None] * k_t + j[None, :], inside, 0.0)
        dq, dk = tl.zeros_like(q), tl.zeros_like(k)
        a, b, da, db = q, k, dq, dk
        if LOOKUP:
            a = tl.load(a_ + s[:, None] * a_t + j[None, :], inside, 0.0)
            b = tl.load(b_ + s[:, None] * b_t + j[None, :], inside, 0.0)
        if ONE:
            dq = tl.dot(dqk, k, dq, input_precision=PRECISION, out_dtype=dtype)
            dk = tl.dot(tl.trans(dqk), q, dk, input_precision=PRECISION, out_dtype=dtype)
            if LOOKUP:
                dq = tl.dot(dqb, b, dq, input_precision=PRECISION, out_dtype=dtype)
                dk = tl.dot(tl.trans(dak), a, dk, input_precision=PRECISION, out_dtype=dtype)
                da = tl.dot(dak, k, da, input_precision=PRECISION, out_dtype=dtype)
                da = tl.dot(dab, b, da, input_precision=PRECISION, out_dtype=dtype)
                db = tl.dot(tl.trans(dqb), q, db, input_precision=PRECISION, out_dtype=dtype)
                db = tl.dot(tl.trans(dab), a, db, input_precision=PRECISION, out_dtype=dtype)
            read, find, kept = since[:, None], since_strict[:, None], until[:, None]
        else:
            w = _decays(w_, s[:, None] * w_t + j[None, :], inside)
            own, strict = w, tl.zeros_like(w)
            strict += _resets(starts_, row, s, i >= 0, t, zero, PACKED)[:, None]
            until, total = tl.zeros_like(w), w + strict
            if EARLY:
                own = tl.zeros_like(w)
            for level in range(LEVELS):
                across = ((i[:, None] >> level) ^ (i[None, :] >> level)) == 1
                read, find, kept = tl.exp(strict + own), tl.exp(strict), tl.exp(until)
                x, reads, writes = tl.where(across, dqk, 0.0), q * read, k * kept
                dq += read * tl.dot(x, writes, input_precision=PRECISION)
                dk += kept * tl.dot(tl.trans(x), reads, input_precision=PRECISION)
                if LOOKUP:
                    finds, forgets = a * find, b * kept
                    x = tl.where(across, dqb, 0.0)
                    dq += read * tl.dot(x, forgets, input_precision=PRECISION)
                    db += kept * tl.dot(tl.trans(x), reads, input_precision=PRECISION)
                    x = tl.where(across, dak, 0.0)
                    da += find * tl.dot(x, writes, input_precision=PRECISION)
                    dk += kept * tl.dot(tl.trans(x), finds, input_precision=PRECISION)
                    x = tl.where(across, dab, 0.0)
                    da += find * tl.dot(x, forgets, input_precision=PRECISION)
                    db += kept * tl.dot(tl.trans(x), finds, input_precision=PRECISION)
                other = _swapped(total, 1 << level)
                right = ((i >> level) & 1 == 1)[:, None]
                strict += tl.where(right, other, 0.0)
                until += tl.where(right, 0.0, other)
                total += other
            read, find, kept = tl.exp(strict + own), tl.exp(strict), tl.exp(until)
        dq += read * tl.load(dseen_ + at, inside, 0.0)
        dwrites = kept * tl.load(dseen_ + part * n + at, inside, 0.0)
        dk += dwrites
        ends = tl.sum(k * dwrites, 0)
        late_log, strict_log = q * dq - k * dk, tl.zeros_like(q)
        if EARLY:
            late_log, strict_log = -k * dk, q * dq
        if LOOKUP:
            da += find * tl.load(dseen_ + 2 * part * n + at, inside, 0.0)
            dwrites = kept * tl.load(dseen_ + 3 * part * n + at, inside, 0.0)
            db += dwrites
            ends += tl.sum(b * dwrites, 0)
            strict_log += a * da
            late_log -= b * db
            tl.store(da_ + to, da, inside)
            tl.store(db_ + to, db, inside)
        if ONE:
            late_sum += tl.sum(late_log, 1)
            strict_sum += tl.sum(strict_log, 1)
            end_sum += tl.sum(ends, 0)
        else:
            ends += tl.load(dfade_ + place * n + j, j < n, 0.0)
            dw = _sums(late_log, strict_log) + ends[None, :]
            tl.store(dw_ + to, tl.where(first_token[:, None], 0.0, dw), inside)
            if not EARLY:
                alone = i[:, None] == i[None, :]
                own = tl.sum(tl.where(alone, dqk, 0.0), 1)[:, None]
                dq += own * k
                dk += own * q
                if LOOKUP:
                    own = tl.sum(tl.where(alone, dqb, 0.0), 1)[:, None]
                    dq += own * b
                    tl.store(db_ + to, db + own * q, inside)
        tl.store(dq_ + to, dq, inside)
        tl.store(dk_ + to, dk, inside)
    if ONE:
        dw = _sums(late_sum, strict_sum) + end_sum + tl.load(dfade_ + place)
        tl.store(dw_ + (row * t + s) * h + head, tl.where(first_token, 0.0, dw), s < t)
