// The banks of oscillators of ops/s4.py and ops/dplr.py: a state space per channel that is diagonal,
// or diagonal but for one number that all its states see and hear,
//
//   s = Re sum_n r_n h_n[t-1]
//   h_n[t] = a_n h_n[t-1] + b_n u[t] - g_n s,        y[t] = Re sum_n c_n h_n[t]
//
// forward and backward. Vectors run over channels; of each complex number re and im lie in two
// vectors, one after the other. An item is one row of the batch and CHANNELS vectors, which go
// through time in blocks of STEPS tokens; backward computes a block again from the states before
// it, and sums the gradients of the numbers above over the block state by state.
#include "common.h"

enum { CHANNELS = 8, STEPS = 16 };
enum { A, B, C, G, R, MAPS };                                           // G, R: NULL if diagonal
enum { U = MAPS, H0, STARTS, BEFORE, Y, LAST };                         // forward
enum { DY = Y, DLAST, DU, DH0, DMAPS };                                 // backward: then MAPS more
enum { N_B, N_T, N_D, N_N, U_B, U_T, THREADS };                         // N_N: real numbers, 2 n

typedef struct {
  int64_t i, first, vectors, t, d, n, blocks;
  int maps;
  const uint8_t *starts;
} place;
typedef struct { vec u[STEPS], y[STEPS], s[STEPS], du[STEPS], ds[STEPS]; uint8_t first[STEPS]; } block;

static int64_t parts_of(const int64_t *s) {
  return (s[N_D] + CHANNELS * WIDTH - 1) / (CHANNELS * WIDTH);
}
static place find(void **p, const int64_t *s, int64_t item) {
  int64_t span = CHANNELS * WIDTH, parts = parts_of(s);
  place w = {.i = item / parts, .first = item % parts * span, .t = s[N_T], .d = s[N_D], .n = s[N_N]};
  int64_t left = w.d - w.first < span ? w.d - w.first : span;
  w.vectors = (left + WIDTH - 1) / WIDTH, w.blocks = (w.t + STEPS - 1) / STEPS;
  w.maps = p[G] ? MAPS : G;
  w.starts = p[STARTS] ? (const uint8_t *)p[STARTS] + w.i * w.t : NULL;
  return w;
}
INLINE int64_t lanes(const place *w, int64_t v) {
  int64_t left = w->d - w->first - v * WIDTH;
  return left < WIDTH ? left : WIDTH;
}
// The numbers of one vector of channels, between (d, n) and (n, LANES).
static void take_states(real *to, const real *from, const place *w, int64_t v) {
  const real *p = from + (w->first + v * WIDTH) * w->n;
  for (int64_t j = 0; j < w->n; j++) store(to + j * WIDTH, gather(p + j, w->n, lanes(w, v)));
}
static void give_states(real *to, const real *from, const place *w, int64_t v) {
  real *p = to + (w->first + v * WIDTH) * w->n;
  for (int64_t j = 0; j < w->n; j++) scatter(p + j, w->n, load(from + j * WIDTH), lanes(w, v));
}
// Where the states before block k of a vector of channels are kept: (blocks, b, vectors, n, LANES).
INLINE real *kept(void **p, const int64_t *s, const place *w, int64_t k, int64_t v) {
  int64_t all = (w->d + WIDTH - 1) / WIDTH, here = w->first / WIDTH + v;
  return (real *)p[BEFORE] + ((k * s[N_B] + w->i) * all + here) * w->n * WIDTH;
}
static int64_t open_block(block *o, void **p, const int64_t *s, const place *w, int64_t v, int64_t k,
                          int64_t ahead) {
  int64_t t0 = k * STEPS, steps = w->t - t0 < STEPS ? w->t - t0 : STEPS, m = lanes(w, v);
  const real *u = (const real *)p[U] + w->i * s[U_B] + t0 * s[U_T] + w->first + v * WIDTH;
  for (int64_t t = 0; t < steps; t++) {
    __builtin_prefetch(u + (t + ahead) * s[U_T]);
    o->u[t] = load_some(u + t * s[U_T], m), o->first[t] = w->starts ? w->starts[t0 + t] : 0;
  }
  return steps;
}

// A block of one vector of channels; x: the maps, (MAPS, n, LANES). hs: every state is kept there.
INLINE void ahead(block *o, int64_t steps, const real *x, real *h, int64_t n, real *hs, const int fed,
                  const int keep) {
  int64_t all = n * WIDTH;
  const real *a = x, *b = x + B * all, *c = x + C * all, *g = x + G * all, *r = x + R * all;
  vec seen = splat(0), also = splat(0);
  if (keep) memcpy(hs, h, (size_t)all * sizeof(real));
  if (fed)
    for (int64_t j = 0; j < all; j += 2 * WIDTH) {
      seen += load(r + j) * load(h + j), also += load(r + j + WIDTH) * load(h + j + WIDTH);
    }
  for (int64_t t = 0; t < steps; t++) {
    if (o->first[t]) memset(h, 0, (size_t)all * sizeof(real)), seen = also = splat(0);
    vec u = o->u[t], s = seen - also, y = splat(0), less = splat(0);
    if (fed) o->s[t] = s, seen = also = splat(0);
    for (int64_t j = 0; j < all; j += 2 * WIDTH) {
      vec re = load(h + j), im = load(h + j + WIDTH), are = load(a + j), aim = load(a + j + WIDTH);
      vec new_re = are * re - aim * im + load(b + j) * u;
      vec new_im = are * im + aim * re + load(b + j + WIDTH) * u;
      if (fed) {
        new_re -= load(g + j) * s, new_im -= load(g + j + WIDTH) * s;
        seen += load(r + j) * new_re, also += load(r + j + WIDTH) * new_im;
      }
      y += load(c + j) * new_re, less += load(c + j + WIDTH) * new_im;
      store(h + j, new_re), store(h + j + WIDTH, new_im);
      if (keep) {
        store(hs + (t + 1) * all + j, new_re), store(hs + (t + 1) * all + j + WIDTH, new_im);
      }
    }
    o->y[t] = y - less;
  }
}

// The way back through a block; o->y holds dy. q: gradient of the states after it, then before it.
// qs: that of the states after every token.
INLINE void back(block *o, int64_t steps, const real *x, real *q, int64_t n, real *qs, const int fed) {
  int64_t all = n * WIDTH;
  const real *a = x, *b = x + B * all, *c = x + C * all, *g = x + G * all, *r = x + R * all;
  for (int64_t t = steps - 1; t >= 0; t--) {
    real *kept = qs + t * all;
    vec dy = o->y[t], du = splat(0), also = splat(0), ds = splat(0), more = splat(0);
    for (int64_t j = 0; j < all; j += 2 * WIDTH) {
      vec re = load(q + j) + dy * load(c + j), im = load(q + j + WIDTH) - dy * load(c + j + WIDTH);
      du += load(b + j) * re, also += load(b + j + WIDTH) * im;
      if (fed) ds += load(g + j) * re, more += load(g + j + WIDTH) * im;
      store(kept + j, re), store(kept + j + WIDTH, im);
    }
    o->du[t] = du + also, o->ds[t] = ds = -(ds + more);
    if (o->first[t]) memset(q, 0, (size_t)all * sizeof(real));
    else
      for (int64_t j = 0; j < all; j += 2 * WIDTH) {
        vec re = load(kept + j), im = load(kept + j + WIDTH);
        vec are = load(a + j), aim = load(a + j + WIDTH);
        vec new_re = are * re + aim * im, new_im = are * im - aim * re;
        if (fed) new_re += ds * load(r + j), new_im -= ds * load(r + j + WIDTH);
        store(q + j, new_re), store(q + j + WIDTH, new_im);
      }
  }
}

// Adds to dx (MAPS, n, LANES) what a block says of the maps.
INLINE void sum_maps(const block *o, int64_t steps, real *dx, int64_t n, const real *hs,
                     const real *qs, const int fed) {
  int64_t all = n * WIDTH;
  for (int64_t j = 0; j < all; j += 2 * WIDTH) {
    vec sum[MAPS][2];
    for (int k = 0; k < (fed ? MAPS : G); k++)
      sum[k][0] = load(dx + k * all + j), sum[k][1] = load(dx + k * all + j + WIDTH);
    vec re = load(hs + j), im = load(hs + j + WIDTH);
    for (int64_t t = 0; t < steps; t++) {
      vec qre = load(qs + t * all + j), qim = load(qs + t * all + j + WIDTH), dy = o->y[t];
      if (o->first[t]) re = im = splat(0);
      sum[A][0] += qre * re + qim * im, sum[A][1] += qim * re - qre * im;
      sum[B][0] += qre * o->u[t], sum[B][1] += qim * o->u[t];
      if (fed) {
        sum[G][0] -= qre * o->s[t], sum[G][1] -= qim * o->s[t];
        sum[R][0] += re * o->ds[t], sum[R][1] -= im * o->ds[t];
      }
      re = load(hs + (t + 1) * all + j), im = load(hs + (t + 1) * all + j + WIDTH);
      sum[C][0] += dy * re, sum[C][1] -= dy * im;
    }
    for (int k = 0; k < (fed ? MAPS : G); k++)
      store(dx + k * all + j, sum[k][0]), store(dx + k * all + j + WIDTH, sum[k][1]);
  }
}

static void run_ahead(block *o, int64_t steps, const real *x, real *h, int64_t n, int fed) {
  if (fed) ahead(o, steps, x, h, n, NULL, 1, 0); else ahead(o, steps, x, h, n, NULL, 0, 0);
}
static void run_again(block *o, int64_t steps, const real *x, real *h, int64_t n, real *hs, int fed) {
  if (fed) ahead(o, steps, x, h, n, hs, 1, 1); else ahead(o, steps, x, h, n, hs, 0, 1);
}
static void run_back(block *o, int64_t steps, const real *x, real *q, int64_t n, real *dx,
                     const real *hs, real *qs, int fed) {
  if (fed) back(o, steps, x, q, n, qs, 1), sum_maps(o, steps, dx, n, hs, qs, 1);
  else back(o, steps, x, q, n, qs, 0), sum_maps(o, steps, dx, n, hs, qs, 0);
}

static void forward_item(void **p, const int64_t *s, int64_t item) {
  place w = find(p, s, item);
  int64_t all = w.n * WIDTH;
  real *space = room(CHANNELS * (MAPS + 1) * all), *h = space + CHANNELS * MAPS * all;
  block o;
  for (int64_t v = 0; v < w.vectors; v++) {
    for (int k = 0; k < w.maps; k++) take_states(space + (v * MAPS + k) * all, p[k], &w, v);
    take_states(h + v * all, (const real *)p[H0] + w.i * w.d * w.n, &w, v);
  }
  for (int64_t k = 0; k < w.blocks; k++)
    for (int64_t v = 0; v < w.vectors; v++) {
      int64_t steps = open_block(&o, p, s, &w, v, k, STEPS), m = lanes(&w, v);
      if (p[BEFORE]) memcpy(kept(p, s, &w, k, v), h + v * all, (size_t)all * sizeof(real));
      run_ahead(&o, steps, space + v * MAPS * all, h + v * all, w.n, p[G] != NULL);
      real *y = (real *)p[Y] + (w.i * w.t + k * STEPS) * w.d + w.first + v * WIDTH;
      for (int64_t t = 0; t < steps; t++) store_some(y + t * w.d, o.y[t], m);
    }
  for (int64_t v = 0; v < w.vectors; v++)
    give_states((real *)p[LAST] + w.i * w.d * w.n, h + v * all, &w, v);
  free(space);
}

static void backward_item(void **p, const int64_t *s, int64_t item) {
  place w = find(p, s, item);
  int64_t all = w.n * WIDTH, state = w.i * w.d * w.n;
  real *space = room((CHANNELS * (2 * MAPS + 1) + 2 * STEPS + 2) * all);
  real *dx = space + CHANNELS * MAPS * all, *q = dx + CHANNELS * MAPS * all, *h = q + CHANNELS * all;
  real *hs = h + all, *qs = hs + (STEPS + 1) * all;
  block o;
  memset(dx, 0, (size_t)(CHANNELS * MAPS * all) * sizeof(real));
  for (int64_t v = 0; v < w.vectors; v++) {
    for (int k = 0; k < w.maps; k++) take_states(space + (v * MAPS + k) * all, p[k], &w, v);
    take_states(q + v * all, (const real *)p[DLAST] + state, &w, v);
  }
  for (int64_t k = w.blocks - 1; k >= 0; k--)
    for (int64_t v = 0; v < w.vectors; v++) {
      int64_t steps = open_block(&o, p, s, &w, v, k, -STEPS), m = lanes(&w, v);
      int64_t at = (w.i * w.t + k * STEPS) * w.d + w.first + v * WIDTH;
      memcpy(h, kept(p, s, &w, k, v), (size_t)all * sizeof(real));
      run_again(&o, steps, space + v * MAPS * all, h, w.n, hs, p[G] != NULL);
      const real *dy = (const real *)p[DY] + at;
      for (int64_t t = 0; t < steps; t++) {
        __builtin_prefetch(dy + (t - STEPS) * w.d);
        o.y[t] = load_some(dy + t * w.d, m);
      }
      run_back(&o, steps, space + v * MAPS * all, q + v * all, w.n, dx + v * MAPS * all, hs, qs,
               p[G] != NULL);
      real *du = (real *)p[DU] + at;
      for (int64_t t = 0; t < steps; t++) store_some(du + t * w.d, o.du[t], m);
    }
  for (int64_t v = 0; v < w.vectors; v++) {
    give_states((real *)p[DH0] + state, q + v * all, &w, v);
    for (int k = 0; k < w.maps; k++)
      give_states((real *)p[DMAPS + k] + state, dx + (v * MAPS + k) * all, &w, v);
  }
  free(space);
}

void NAME(oscillators_forward)(void **p, const int64_t *s) {
  kizzasi_share(forward_item, p, s, s[N_B] * parts_of(s), s[THREADS]);
}
void NAME(oscillators_backward)(void **p, const int64_t *s) {
  kizzasi_share(backward_item, p, s, s[N_B] * parts_of(s), s[THREADS]);
}
// For how many tokens a state is kept for backward.
void NAME(oscillators_sizes)(void **p, const int64_t *s) {
  ((int64_t *)p[0])[0] = STEPS;
}
