// The selective scan of ops/selective_scan.py, forward and backward.
//
// Vectors run over channels; the states of one vector of channels stay in registers, 16, 8 or 4 at
// a time. An item is one row of the batch and CHANNELS vectors. It goes through time in blocks of
// STEPS tokens, so that rows are read in runs longer than a cache line, and backward computes a
// block again from the state before it, all of which stays in the first cache.
#include "common.h"

enum { CHANNELS = 8, STEPS = 32 };

enum { U, DT, A, B, C, D, H0, Z, STARTS, BEFORE, Y, LAST };                     // forward
enum { DY = Y, DLAST, DU, DDT, DA, DB, DC, DD, DH0, DZ };                       // backward
enum { N_B, N_T, N_D, N_N, U_B, U_T, DT_B, DT_T, B_B, B_T, C_B, C_T, Z_B, Z_T, SOFTPLUS, THREADS };

// What an item is: row i, channels from `first` in `vectors` vectors, np states, padded to fours.
typedef struct {
  int64_t i, part, first, vectors, t, d, n, np, blocks;
} place;

static place find(const int64_t *s, int64_t item) {
  int64_t d = s[N_D], span = CHANNELS * WIDTH, parts = (d + span - 1) / span;
  place w = {.i = item / parts, .part = item % parts, .t = s[N_T], .d = d, .n = s[N_N]};
  w.first = w.part * span;
  int64_t left = d - w.first < span ? d - w.first : span;
  w.vectors = (left + WIDTH - 1) / WIDTH;
  w.np = (w.n + 3) / 4 * 4;
  w.blocks = (w.t + STEPS - 1) / STEPS;
  return w;
}
static int64_t parts_of(const int64_t *s) {
  return (s[N_D] + CHANNELS * WIDTH - 1) / (CHANNELS * WIDTH);
}
INLINE int64_t lanes(const place *w, int64_t v) {
  int64_t left = w->d - w->first - v * WIDTH;
  return left < WIDTH ? left : WIDTH;
}
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Where the state before block k of a vector of channels is kept: (blocks, b, vectors, n, LANES).
INLINE real *kept(void **p, const int64_t *s, const place *w, int64_t k, int64_t v) {
  int64_t all = (w->d + WIDTH - 1) / WIDTH, here = w->first / WIDTH + v;
  return (real *)p[BEFORE] + ((k * s[N_B] + w->i) * all + here) * w->n * WIDTH;
}

// Rows of B or C of a block, each padded with zeros to np.
static void take_rows(real *to, const real *from, int64_t stride, const place *w, int64_t steps) {
  for (int64_t s = 0; s < steps; s++) {
    memcpy(to + s * w->np, from + s * stride, (size_t)w->n * sizeof(real));
    for (int64_t j = w->n; j < w->np; j++) to[s * w->np + j] = 0;
  }
}
// Rates of one vector of channels, from (d, n) to (np, LANES).
static void take_states(real *to, const real *from, const place *w, int64_t v) {
  const real *p = from + (w->first + v * WIDTH) * w->n;
  for (int64_t j = 0; j < w->np; j++)
    store(to + j * WIDTH, j < w->n ? gather(p + j, w->n, lanes(w, v)) : splat(0));
}
static void give_states(real *to, const real *from, const place *w, int64_t v) {
  real *p = to + (w->first + v * WIDTH) * w->n;
  for (int64_t j = 0; j < w->n; j++) scatter(p + j, w->n, load(from + j * WIDTH), lanes(w, v));
}

// One block of one vector of channels.
typedef struct {
  vec dt[STEPS], x[STEPS], y[STEPS], u[STEPS], dy[STEPS], dx[STEPS], ddt[STEPS];
  uint8_t first[STEPS];
} block;

// G states through a block. a: rates over ln 2. keep: every state and decay is kept.
INLINE void forward_states(const int G, block *o, int64_t steps, const real *a_, real *h_,
                           const real *Bs, const real *Cs, int64_t np, real *hs, real *es,
                           int keep) {
  vec a[16], h[16];
  for (int j = 0; j < G; j++) a[j] = load(a_ + j * WIDTH) * LOG2E, h[j] = load(h_ + j * WIDTH);
  if (keep) for (int j = 0; j < G; j++) store(hs + j * WIDTH, h[j]);
  for (int64_t s = 0; s < steps; s++) {
    const real *Bt = Bs + s * np, *Ct = Cs + s * np;
    vec dt = o->dt[s], x = o->x[s], even = o->y[s], odd = splat(0);
    if (o->first[s]) for (int j = 0; j < G; j++) h[j] = splat(0);
#pragma GCC unroll 16
    for (int j = 0; j < G; j++) {
      vec e = power2(dt * a[j]);
      h[j] = e * h[j] + x * Bt[j];
      if (keep) {
        store(es + (s * np + j) * WIDTH, e);
        store(hs + ((s + 1) * np + j) * WIDTH, h[j]);
      }
      if (j & 1) odd += h[j] * Ct[j]; else even += h[j] * Ct[j];
    }
    if (keep && o->first[s])
      for (int j = 0; j < G; j++) store(es + (s * np + j) * WIDTH, splat(0));
    o->y[s] = even + odd;
  }
  for (int j = 0; j < G; j++) store(h_ + j * WIDTH, h[j]);
}

static void forward_block(block *o, int64_t steps, const real *a, real *h, const real *Bs,
                          const real *Cs, int64_t np, real *hs, real *es) {
  int keep = hs != NULL;
  for (int64_t j = 0; j < np;) {
    int64_t w = j * WIDTH;
    real *hj = keep ? hs + w : NULL, *ej = keep ? es + w : NULL;
#define RUN(G) forward_states(G, o, steps, a + w, h + w, Bs + j, Cs + j, np, hj, ej, keep), j += G
    if (keep) {
      if (np - j >= 16) RUN(16); else if (np - j >= 8) RUN(8); else RUN(4);
    } else {
      hj = ej = NULL;
#define FAST(G) forward_states(G, o, steps, a + w, h + w, Bs + j, Cs + j, np, hj, ej, 0), j += G
      if (np - j >= 16) FAST(16); else if (np - j >= 8) FAST(8); else FAST(4);
    }
  }
}

// dt and u of a block, and y = D u to begin with.
INLINE void open_block(block *o, void **p, const int64_t *s, const place *w, int64_t v, int64_t t0,
                       int64_t steps, int64_t ahead) {
  int64_t at = w->first + v * WIDTH, m = lanes(w, v);
  const real *u = (const real *)p[U] + w->i * s[U_B] + t0 * s[U_T] + at;
  const real *dt = (const real *)p[DT] + w->i * s[DT_B] + t0 * s[DT_T] + at;
  const uint8_t *starts = p[STARTS];
  vec skip = load_some((const real *)p[D] + at, m);
  for (int64_t k = 0; k < steps; k++) {
    __builtin_prefetch(u + (k + ahead) * s[U_T]);
    __builtin_prefetch(dt + (k + ahead) * s[DT_T]);
    vec step = load_some(dt + k * s[DT_T], m), uk = load_some(u + k * s[U_T], m);
    if (s[SOFTPLUS]) step = softplus(step);
    o->dt[k] = step, o->u[k] = uk, o->x[k] = step * uk, o->y[k] = skip * uk;
    o->first[k] = starts ? starts[w->i * w->t + t0 + k] : 0;
  }
}

static void forward_item(void **p, const int64_t *s, int64_t item) {
  place w = find(s, item);
  int64_t states = w.np * WIDTH, per = CHANNELS * states;
  real *space = room(2 * per + 2 * STEPS * w.np);
  real *a = space, *h = a + per, *Bs = h + per, *Cs = Bs + STEPS * w.np;
  block o;
  for (int64_t v = 0; v < w.vectors; v++) {
    take_states(a + v * states, p[A], &w, v);
    take_states(h + v * states, (const real *)p[H0] + w.i * w.d * w.n, &w, v);
  }
  for (int64_t k = 0; k < w.blocks; k++) {
    int64_t t0 = k * STEPS, steps = least(STEPS, w.t - t0);
    take_rows(Bs, (const real *)p[B] + w.i * s[B_B] + t0 * s[B_T], s[B_T], &w, steps);
    take_rows(Cs, (const real *)p[C] + w.i * s[C_B] + t0 * s[C_T], s[C_T], &w, steps);
    for (int64_t v = 0; v < w.vectors; v++) {
      int64_t at = w.first + v * WIDTH, m = lanes(&w, v);
      if (p[BEFORE])
        memcpy(kept(p, s, &w, k, v), h + v * states, (size_t)(w.n * WIDTH) * sizeof(real));
      open_block(&o, p, s, &w, v, t0, steps, STEPS);
      forward_block(&o, steps, a + v * states, h + v * states, Bs, Cs, w.np, NULL, NULL);
      real *y = (real *)p[Y] + (w.i * w.t + t0) * w.d + at;
      const real *z = p[Z] ? (const real *)p[Z] + w.i * s[Z_B] + t0 * s[Z_T] + at : NULL;
      for (int64_t j = 0; j < steps; j++) {
        vec out = o.y[j];
        if (z) {
          __builtin_prefetch(z + (j + STEPS) * s[Z_T]);
          vec gate = load_some(z + j * s[Z_T], m);
          out = out * gate * sigmoid(gate);
        }
        __builtin_prefetch(y + (j + STEPS) * w.d, 1);
        store_some(y + j * w.d, out, m);
      }
    }
  }
  for (int64_t v = 0; v < w.vectors; v++)
    give_states((real *)p[LAST] + w.i * w.d * w.n, h + v * states, &w, v);
  free(space);
}

void NAME(scan_forward)(void **p, const int64_t *s) {
  kizzasi_share(forward_item, p, s, s[N_B] * parts_of(s), s[THREADS]);
}

// g: gradient of the state after a token, on the way back; da of the rates. dBs, dCs: sums over the
// vectors of channels of an item, each (steps, np, LANES).
INLINE void backward_states(const int G, block *o, int64_t steps, const real *a_, real *g_,
                            real *da_, const real *Bs, const real *Cs, int64_t np, const real *hs,
                            const real *es, real *dBs, real *dCs) {
  vec g[16], da[16];
  for (int j = 0; j < G; j++) g[j] = load(g_ + j * WIDTH), da[j] = load(da_ + j * WIDTH);
  for (int64_t s = steps - 1; s >= 0; s--) {
    const real *Bt = Bs + s * np, *Ct = Cs + s * np;
    const real *before = hs + s * np * WIDTH, *after = before + np * WIDTH;
    const real *e_ = es + s * np * WIDTH;
    real *dBt = dBs + s * np * WIDTH, *dCt = dCs + s * np * WIDTH;
    vec dt = o->dt[s], x = o->x[s], dy = o->dy[s], dx = o->dx[s], ddt = o->ddt[s];
#pragma GCC unroll 16
    for (int j = 0; j < G; j++) {
      int64_t w = j * WIDTH;
      vec gj = g[j] + dy * Ct[j];
      store(dCt + w, load(dCt + w) + dy * load(after + w));
      store(dBt + w, load(dBt + w) + x * gj);
      dx += gj * Bt[j];
      gj *= load(e_ + w);
      vec exponent = gj * load(before + w);
      da[j] += exponent * dt;
      ddt += exponent * load(a_ + w);
      g[j] = gj;
    }
    o->dx[s] = dx, o->ddt[s] = ddt;
  }
  for (int j = 0; j < G; j++) store(g_ + j * WIDTH, g[j]), store(da_ + j * WIDTH, da[j]);
}

static void backward_item(void **p, const int64_t *s, int64_t item) {
  place w = find(s, item);
  int64_t states = w.np * WIDTH, per = CHANNELS * states, one = STEPS * states;
  real *space = room(3 * per + (2 * STEPS + 1) * states + 2 * one + states + 2 * STEPS * w.np);
  real *a = space, *g = a + per, *da = g + per, *hs = da + per, *es = hs + one + states;
  real *dBs = es + one, *dCs = dBs + one, *h = dCs + one, *Bs = h + states, *Cs = Bs + STEPS * w.np;
  vec dD[CHANNELS];
  block o;
  for (int64_t v = 0; v < w.vectors; v++) {
    take_states(a + v * states, p[A], &w, v);
    take_states(g + v * states, (const real *)p[DLAST] + w.i * w.d * w.n, &w, v);
    dD[v] = splat(0);
  }
  memset(da, 0, (size_t)per * sizeof(real));
  memset(h, 0, (size_t)states * sizeof(real));
  for (int64_t k = w.blocks - 1; k >= 0; k--) {
    int64_t t0 = k * STEPS, steps = least(STEPS, w.t - t0);
    take_rows(Bs, (const real *)p[B] + w.i * s[B_B] + t0 * s[B_T], s[B_T], &w, steps);
    take_rows(Cs, (const real *)p[C] + w.i * s[C_B] + t0 * s[C_T], s[C_T], &w, steps);
    memset(dBs, 0, (size_t)(2 * one) * sizeof(real));
    for (int64_t v = 0; v < w.vectors; v++) {
      int64_t at = w.first + v * WIDTH, m = lanes(&w, v), row = (w.i * w.t + t0) * w.d + at;
      const real *av = a + v * states;
      open_block(&o, p, s, &w, v, t0, steps, -STEPS);
      memcpy(h, kept(p, s, &w, k, v), (size_t)(w.n * WIDTH) * sizeof(real));
      if (k) {
        const real *next = kept(p, s, &w, k - 1, v);
        for (int64_t j = 0; j < w.n; j++) __builtin_prefetch(next + j * WIDTH);
      }
      forward_block(&o, steps, av, h, Bs, Cs, w.np, hs, es);
      memset(h, 0, (size_t)states * sizeof(real));
      const real *z = p[Z] ? (const real *)p[Z] + w.i * s[Z_B] + t0 * s[Z_T] + at : NULL;
      for (int64_t j = 0; j < steps; j++) {
        const real *dy_ = (const real *)p[DY] + row + j * w.d;
        __builtin_prefetch(dy_ - STEPS * w.d);
        vec dy = load_some(dy_, m);
        if (z) {
          vec gate = load_some(z + j * s[Z_T], m), on = sigmoid(gate), silu = gate * on;
          store_some((real *)p[DZ] + row + j * w.d, dy * o.y[j] * (on + silu * (1 - on)), m);
          dy *= silu;
        }
        o.dy[j] = dy, o.dx[j] = o.ddt[j] = splat(0);
      }
      for (int64_t j = 0; j < w.np;) {
        int64_t x = j * WIDTH;
        real *gv = g + v * states + x, *dav = da + v * states + x;
#define BACK(G)                                                                                  \
  backward_states(G, &o, steps, av + x, gv, dav, Bs + j, Cs + j, w.np, hs + x, es + x, dBs + x,  \
                  dCs + x), j += G
        if (w.np - j >= 16) BACK(16); else if (w.np - j >= 8) BACK(8); else BACK(4);
      }
      vec skip = load_some((const real *)p[D] + at, m);
      const real *raw = (const real *)p[DT] + w.i * s[DT_B] + t0 * s[DT_T] + at;
      for (int64_t j = 0; j < steps; j++) {
        vec ddt = o.ddt[j] + o.dx[j] * o.u[j];
        if (s[SOFTPLUS]) ddt *= sigmoid(load_some(raw + j * s[DT_T], m));
        real *du_ = (real *)p[DU] + row + j * w.d, *ddt_ = (real *)p[DDT] + row + j * w.d;
        __builtin_prefetch(du_ - STEPS * w.d, 1);
        __builtin_prefetch(ddt_ - STEPS * w.d, 1);
        store_some(du_, o.dx[j] * o.dt[j] + skip * o.dy[j], m);
        store_some(ddt_, ddt, m);
        dD[v] += o.dy[j] * o.u[j];
      }
    }
    int64_t to = ((w.part * s[N_B] + w.i) * w.t + t0) * w.n;
    for (int64_t j = 0; j < steps; j++)
      for (int64_t q = 0; q < w.n; q++) {
        ((real *)p[DB])[to + j * w.n + q] = total(load(dBs + (j * w.np + q) * WIDTH));
        ((real *)p[DC])[to + j * w.n + q] = total(load(dCs + (j * w.np + q) * WIDTH));
      }
  }
  for (int64_t v = 0; v < w.vectors; v++) {
    give_states((real *)p[DH0] + w.i * w.d * w.n, g + v * states, &w, v);
    give_states((real *)p[DA] + w.i * w.d * w.n, da + v * states, &w, v);
    int64_t at = w.first + v * WIDTH;
    store_some((real *)p[DD] + w.i * w.d + at, dD[v], lanes(&w, v));
  }
  free(space);
}

void NAME(scan_backward)(void **p, const int64_t *s) {
  kizzasi_share(backward_item, p, s, s[N_B] * parts_of(s), s[THREADS]);
}

// (tokens to a block, parts of the channels of a row): what the caller makes room by.
void NAME(scan_sizes)(void **p, const int64_t *s) {
  int64_t *to = (int64_t *)p[0];
  to[0] = STEPS, to[1] = parts_of(s);
}
