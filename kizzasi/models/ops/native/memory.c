// A matrix memory that fades, is corrected, written and read: linear attention with decay, state
// space duality, the delta rules and RWKV-7 are all
//
//   S[t] = S[t-1] diag(exp(w[t])) + (S[t-1] a[t]) b[t]^T + v[t] k[t]^T
//   y[t] = S[t] q[t],  or S[t-1] q[t]
//
// with S indexed [value, key], a row for each of the m channels of a value. Rows know nothing of one
// another: ROWS of them go through STEPS tokens together, with vectors along the n channels of a
// key. An item is one head of one row of the batch. Backward computes a block again from the memory
// before it. A plain memory, where nothing is looked up (no a, and S[t] is read), goes back in one
// pass; where nobody wants the gradient of its decays, what was before each token is not kept.
#include "common.h"

enum { STEPS = 32, ROWS = 4 };
enum { Q, K, V, W, A, B, S0, STARTS, BEFORE, Y, LAST };                       // forward
enum { DY = Y, DLAST, DQ, DK, DV, DW, DA, DB, DS0 };                          // backward
enum { N_B, N_T, N_H, N_N, N_M, Q_, K_ = Q_ + 3, V_ = K_ + 3, W_ = V_ + 3, A_ = W_ + 3, B_ = A_ + 3,
       S_V = B_ + 3, S_K, SHARED, W_ONE, W_FIXED, EARLY, THREADS };           // X_: strides b, t, h

// The inputs of a block of tokens, rows padded with zeros: keys to np, values to mp.
typedef struct {
  int64_t np, mp, steps;
  real *q, *k, *w, *a, *b, *v, *y, *answers;  // y: outputs, or their gradients
  real *dq, *dk, *dw, *da, *db, *dv, *history;
  uint8_t first[STEPS];
} block;

INLINE int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static real *open_block(block *o, const int64_t *s, int backward, real **state, real **slope) {
  o->np = up(s[N_N], WIDTH), o->mp = up(s[N_M], ROWS);
  int64_t keys = STEPS * o->np, values = STEPS * o->mp, all = o->mp * o->np;
  real *space = room(backward ? 10 * keys + 4 * values + 2 * all + ROWS * keys
                              : 5 * keys + 3 * values + all);
  real *at = space;
#define TAKE(size) (at += (size), at - (size))
  o->q = TAKE(keys), o->k = TAKE(keys), o->w = TAKE(keys), o->a = TAKE(keys), o->b = TAKE(keys);
  o->v = TAKE(values), o->y = TAKE(values), o->answers = TAKE(values), *state = TAKE(all);
  if (backward) {
    o->dq = TAKE(keys), o->dk = TAKE(keys), o->dw = TAKE(keys), o->da = TAKE(keys);
    o->db = TAKE(keys), o->dv = TAKE(values), *slope = TAKE(all), o->history = TAKE(ROWS * keys);
  }
  return space;
}

// Rows of a stream, `stride` apart, into a buffer of rows of `width`.
static void take(real *to, const real *from, int64_t stride, int64_t n, int64_t width, int64_t steps) {
  for (int64_t t = 0; t < steps; t++) {
    memcpy(to + t * width, from + t * stride, (size_t)n * sizeof(real));
    for (int64_t j = n; j < width; j++) to[t * width + j] = 0;
  }
}
static void give(real *to, const real *from, int64_t stride, int64_t n, int64_t width, int64_t steps) {
  for (int64_t t = 0; t < steps; t++)
    memcpy(to + t * stride, from + t * width, (size_t)n * sizeof(real));
}

static void read_block(block *o, void **p, const int64_t *s, int64_t item, int64_t t0) {
  int64_t i = item / s[N_H], h = item % s[N_H], n = s[N_N], shared = h / s[SHARED];
  int64_t left = s[N_T] - t0;
  o->steps = left < STEPS ? left : STEPS;
#define FROM(X, head) ((const real *)p[X] + i * s[X##_] + t0 * s[X##_ + 1] + (head) * s[X##_ + 2])
  take(o->q, FROM(Q, shared), s[Q_ + 1], n, o->np, o->steps);
  take(o->k, FROM(K, shared), s[K_ + 1], n, o->np, o->steps);
  take(o->v, FROM(V, h), s[V_ + 1], s[N_M], o->mp, o->steps);
  if (p[A]) {
    take(o->a, FROM(A, h), s[A_ + 1], n, o->np, o->steps);
    take(o->b, FROM(B, h), s[B_ + 1], n, o->np, o->steps);
  }
  const real *w = FROM(W, h);
  for (int64_t t = 0; t < o->steps; t++, w += s[W_ + 1])
    for (int64_t j = 0; j < o->np; j += WIDTH) {
      int64_t m = n - j < WIDTH ? n - j : WIDTH;
      store(o->w + t * o->np + j, exponential(s[W_ONE] ? splat(*w) : load_some(w + j, m)));
    }
  const uint8_t *starts = p[STARTS];
  for (int64_t t = 0; t < o->steps; t++)
    o->first[t] = starts ? starts[i * s[N_T] + t0 + t] : 0;
}

// The memory of an item, (value, key) with any strides, to or from rows of np.
static void take_memory(real *to, const real *from, const block *o, const int64_t *s) {
  memset(to, 0, (size_t)(o->mp * o->np) * sizeof(real));
  for (int64_t r = 0; r < s[N_M]; r++)
    for (int64_t j = 0; j < s[N_N]; j++) to[r * o->np + j] = from[r * s[S_V] + j * s[S_K]];
}
static void give_memory(real *to, const real *from, const block *o, const int64_t *s) {
  for (int64_t r = 0; r < s[N_M]; r++)
    for (int64_t j = 0; j < s[N_N]; j++) to[r * s[S_V] + j * s[S_K]] = from[r * o->np + j];
}

// Rows r .. r + ROWS of the memory through a block. keep: dq is summed, y is given, with KEEP_ALL
// what was before each token is kept too. Else y is what comes out.
enum { KEEP = 1, KEEP_ALL };
INLINE void ahead(block *o, real *S, int64_t r, const int lookup, const int early, const int keep) {
  int64_t np = o->np, mp = o->mp;
  for (int64_t t = 0; t < o->steps; t++) {
    const real *q = o->q + t * np, *k = o->k + t * np, *w = o->w + t * np, *val = o->v + t * mp + r;
    const real *a = o->a + t * np, *b = o->b + t * np;
    real *y = o->y + t * mp + r, *answers = o->answers + t * mp + r;
    if (o->first[t]) memset(S, 0, (size_t)(ROWS * np) * sizeof(real));
    vec sum[ROWS] = {}, value[ROWS], dy[ROWS];
    for (int i = 0; i < ROWS; i++) value[i] = splat(val[i]), dy[i] = splat(keep ? y[i] : 0);
    if (lookup) {
      for (int64_t j = 0; j < np; j += WIDTH) {
        vec aj = load(a + j);
        for (int i = 0; i < ROWS; i++) sum[i] += load(S + i * np + j) * aj;
      }
      for (int i = 0; i < ROWS; i++) answers[i] = total(sum[i]), sum[i] = splat(0);
    }
    for (int64_t j = 0; j < np; j += WIDTH) {
      vec wj = load(w + j), kj = load(k + j), qj = load(q + j), dq = splat(0);
      vec bj = lookup ? load(b + j) : splat(0);
      for (int i = 0; i < ROWS; i++) {
        vec old = load(S + i * np + j), new = old * wj + kj * value[i];
        if (lookup) new += bj * answers[i];
        vec seen = early ? old : new;
        if (keep == KEEP_ALL) store(o->history + (t * ROWS + i) * np + j, old);
        if (keep)
          dq += seen * dy[i];
        else
          sum[i] += seen * qj;
        store(S + i * np + j, new);
      }
      if (keep) store(o->dq + t * np + j, load(o->dq + t * np + j) + dq);
    }
    if (!keep) for (int i = 0; i < ROWS; i++) y[i] = total(sum[i]);
  }
}

// The way back of rows r .. r + ROWS; G is the gradient of the memory after the block, then before.
INLINE void back(block *o, real *G, int64_t r, const int lookup, const int early) {
  int64_t np = o->np, mp = o->mp;
  for (int64_t t = o->steps - 1; t >= 0; t--) {
    const real *q = o->q + t * np, *k = o->k + t * np, *w = o->w + t * np, *val = o->v + t * mp + r;
    const real *a = o->a + t * np, *b = o->b + t * np, *dy = o->y + t * mp + r;
    const real *answers = o->answers + t * mp + r;
    vec dv[ROWS] = {}, sum[ROWS] = {};
    real da[ROWS];
    for (int64_t j = 0; j < np; j += WIDTH) {
      vec kj = load(k + j), qj = load(q + j), bj = lookup ? load(b + j) : splat(0);
      for (int i = 0; i < ROWS; i++) {
        vec g = load(G + i * np + j);
        if (!early) g += qj * dy[i], store(G + i * np + j, g);
        dv[i] += g * kj;
        if (lookup) sum[i] += g * bj;
      }
    }
    for (int i = 0; i < ROWS; i++) {
      o->dv[t * mp + r + i] = total(dv[i]);
      da[i] = lookup ? total(sum[i]) : 0;
    }
    for (int64_t j = 0, at = t * np; j < np; j += WIDTH, at += WIDTH) {
      vec wj = load(w + j), qj = load(q + j), aj = lookup ? load(a + j) : splat(0);
      vec dk = load(o->dk + at), dw = load(o->dw + at), da_ = splat(0), db_ = splat(0);
      for (int i = 0; i < ROWS; i++) {
        vec g = load(G + i * np + j), old = load(o->history + (t * ROWS + i) * np + j);
        dk += g * val[i], dw += g * old;
        if (lookup) db_ += g * answers[i], da_ += old * da[i];
        g *= wj;
        if (lookup) g += aj * da[i];
        if (early) g += qj * dy[i];
        store(G + i * np + j, o->first[t] ? splat(0) : g);
      }
      store(o->dk + at, dk), store(o->dw + at, dw);
      if (lookup) store(o->da + at, load(o->da + at) + da_), store(o->db + at, load(o->db + at) + db_);
    }
  }
}

// The same of a plain memory, with the gradients of its decays or without.
INLINE void back_plainly(block *o, real *G, int64_t r, const int decays) {
  int64_t np = o->np, mp = o->mp;
  for (int64_t t = o->steps - 1; t >= 0; t--) {
    const real *q = o->q + t * np, *k = o->k + t * np, *w = o->w + t * np;
    vec dv[ROWS] = {}, value[ROWS], dy[ROWS];
    for (int i = 0; i < ROWS; i++)
      value[i] = splat(o->v[t * mp + r + i]), dy[i] = splat(o->y[t * mp + r + i]);
    for (int64_t j = 0, at = t * np; j < np; j += WIDTH, at += WIDTH) {
      vec qj = load(q + j), kj = load(k + j), wj = load(w + j);
      vec dk = load(o->dk + at), dw = load(o->dw + at);
      for (int i = 0; i < ROWS; i++) {
        vec g = load(G + i * np + j) + qj * dy[i];
        dv[i] += g * kj, dk += g * value[i];
        if (decays) dw += g * load(o->history + (t * ROWS + i) * np + j);
        store(G + i * np + j, g * wj);
      }
      store(o->dk + at, dk);
      if (decays) store(o->dw + at, dw);
    }
    for (int i = 0; i < ROWS; i++) o->dv[t * mp + r + i] = total(dv[i]);
    if (o->first[t]) memset(G, 0, (size_t)(ROWS * np) * sizeof(real));
  }
}

#define EITHER(call, ...)                                                            \
  if (lookup && early) call(__VA_ARGS__, 1, 1); else if (lookup) call(__VA_ARGS__, 1, 0); \
  else if (early) call(__VA_ARGS__, 0, 1); else call(__VA_ARGS__, 0, 0)

static void run_ahead(block *o, real *S, int64_t r, int lookup, int early) {
#define AHEAD(o, S, r, lookup, early) ahead(o, S, r, lookup, early, 0)
  EITHER(AHEAD, o, S, r);
}
static void run_again(block *o, real *S, int64_t r, int lookup, int early, int decays) {
#define AGAIN(o, S, r, lookup, early) ahead(o, S, r, lookup, early, KEEP_ALL)
  if (!lookup && !early && !decays) ahead(o, S, r, 0, 0, KEEP); else EITHER(AGAIN, o, S, r);
}
static void run_back(block *o, real *G, int64_t r, int lookup, int early, int decays) {
  if (lookup && early) back(o, G, r, 1, 1); else if (lookup) back(o, G, r, 1, 0);
  else if (early) back(o, G, r, 0, 1); else if (decays) back_plainly(o, G, r, 1);
  else back_plainly(o, G, r, 0);
}

static void forward_item(void **p, const int64_t *s, int64_t item) {
  block o;
  int64_t h = item % s[N_H], i = item / s[N_H], items = s[N_B] * s[N_H], m = s[N_M];
  real *S, *none, *space = open_block(&o, s, 0, &S, &none);
  int64_t all = o.mp * o.np, token = s[N_H] * m;
  take_memory(S, (const real *)p[S0] + item * m * s[N_N], &o, s);
  for (int64_t t0 = 0, k = 0; t0 < s[N_T]; t0 += STEPS, k++) {
    read_block(&o, p, s, item, t0);
    if (p[BEFORE])
      memcpy((real *)p[BEFORE] + (k * items + item) * all, S, (size_t)all * sizeof(real));
    for (int64_t r = 0; r < o.mp; r += ROWS) run_ahead(&o, S + r * o.np, r, p[A] != 0, (int)s[EARLY]);
    give((real *)p[Y] + (i * s[N_T] + t0) * token + h * m, o.y, token, m, o.mp, o.steps);
  }
  give_memory((real *)p[LAST] + item * m * s[N_N], S, &o, s);
  free(space);
}

// dw in the shape of w: by head or channel, by token or of all tokens.
static void give_decays(block *o, real *to, real *sum, const int64_t *s, int64_t step) {
  for (int64_t t = 0; t < o->steps; t++) {
    for (int64_t j = 0; j < o->np; j += WIDTH) {
      vec d = load(o->dw + t * o->np + j) * load(o->w + t * o->np + j);
      store(sum + j, s[W_FIXED] ? load(sum + j) + d : d);
    }
    if (s[W_FIXED] && t < o->steps - 1) continue;
    if (s[W_ONE]) {
      vec d = splat(0);
      for (int64_t j = 0; j < o->np; j += WIDTH) d += load(sum + j);
      to[t * step] = total(d);
    } else
      memcpy(to + (s[W_FIXED] ? 0 : t * step), sum, (size_t)s[N_N] * sizeof(real));
  }
}

static void backward_item(void **p, const int64_t *s, int64_t item) {
  block o;
  int64_t h = item % s[N_H], i = item / s[N_H], items = s[N_B] * s[N_H], m = s[N_M], n = s[N_N];
  int lookup = p[A] != 0, early = (int)s[EARLY];
  real *S, *G, *space = open_block(&o, s, 1, &S, &G), *sum = room(o.np);
  int64_t all = o.mp * o.np, keys = (size_t)(STEPS * o.np) * sizeof(real);
  int64_t value = s[N_H] * m, key = s[N_H] * n, width = s[W_ONE] ? 1 : n;
  memset(sum, 0, (size_t)o.np * sizeof(real));
  take_memory(G, (const real *)p[DLAST] + item * m * n, &o, s);
  for (int64_t k = (s[N_T] + STEPS - 1) / STEPS - 1, t0; t0 = k * STEPS, k >= 0; k--) {
    int64_t row = i * s[N_T] + t0;
    read_block(&o, p, s, item, t0);
    take(o.y, (const real *)p[DY] + row * value + h * m, value, m, o.mp, o.steps);
    memcpy(S, (const real *)p[BEFORE] + (k * items + item) * all, (size_t)all * sizeof(real));
    memset(o.dq, 0, keys), memset(o.dk, 0, keys), memset(o.dw, 0, keys);
    memset(o.da, 0, keys), memset(o.db, 0, keys);
    for (int64_t r = 0; r < o.mp; r += ROWS) {
      run_again(&o, S + r * o.np, r, lookup, early, p[DW] != NULL);
      run_back(&o, G + r * o.np, r, lookup, early, p[DW] != NULL);
    }
#define GIVE(X, buffer) give((real *)p[X] + row * key + h * n, o.buffer, key, n, o.np, o.steps)
    GIVE(DQ, dq), GIVE(DK, dk);
    if (lookup) GIVE(DA, da), GIVE(DB, db);
    give((real *)p[DV] + row * value + h * m, o.dv, value, m, o.mp, o.steps);
    if (p[DW]) {
      int64_t at = s[W_FIXED] ? item * width : (row * s[N_H] + h) * width;
      give_decays(&o, (real *)p[DW] + at, sum, s, s[W_FIXED] ? 0 : s[N_H] * width);
    }
  }
  give_memory((real *)p[DS0] + item * m * n, G, &o, s);
  free(space), free(sum);
}

void NAME(memory_forward)(void **p, const int64_t *s) {
  kizzasi_share(forward_item, p, s, s[N_B] * s[N_H], s[THREADS]);
}
void NAME(memory_backward)(void **p, const int64_t *s) {
  kizzasi_share(backward_item, p, s, s[N_B] * s[N_H], s[THREADS]);
}

// How many numbers one state takes that is kept for backward, and for how many tokens one is.
void NAME(memory_sizes)(void **p, const int64_t *s) {
  int64_t *to = (int64_t *)p[0];
  to[0] = STEPS, to[1] = up(s[N_N], WIDTH) * up(s[N_M], ROWS);
}
