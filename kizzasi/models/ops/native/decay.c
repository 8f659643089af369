// The leaky memory of ops/decay_scan.py: h[t] = exp(log_a[t]) h[t-1] + u[t], forward and backward.
// Vectors run over channels; an item is one row of the batch and CHANNELS vectors.
#include "common.h"

enum { CHANNELS = 4, AHEAD = 8 };
enum { LOG_A, U, H0, STARTS, H, DH = 5, DLAST, DLOG_A, DU, DH0 };
enum { N_B, N_T, N_I, A_B, A_T, U_B, U_T, THREADS };

typedef struct {
  int64_t i, at, m, t, n;
  const real *a, *u;
  const uint8_t *starts;
} place;

static place find(void **p, const int64_t *s, int64_t item) {
  int64_t span = CHANNELS * WIDTH, parts = (s[N_I] + span - 1) / span;
  place w = {.i = item / parts, .at = item % parts * span, .t = s[N_T], .n = s[N_I]};
  w.m = w.n - w.at < span ? w.n - w.at : span;
  w.a = (const real *)p[LOG_A] + w.i * s[A_B] + w.at;
  w.u = p[U] ? (const real *)p[U] + w.i * s[U_B] + w.at : NULL;
  w.starts = p[STARTS] ? (const uint8_t *)p[STARTS] + w.i * w.t : NULL;
  return w;
}
#define EACH(v, m_) \
  for (int64_t v = 0, m_; m_ = w.m - v * WIDTH < WIDTH ? w.m - v * WIDTH : WIDTH, v * WIDTH < w.m; v++)

static void forward_item(void **p, const int64_t *s, int64_t item) {
  place w = find(p, s, item);
  real *to = (real *)p[H] + w.i * w.t * w.n + w.at;
  vec h[CHANNELS];
  EACH(v, m) h[v] = load_some((const real *)p[H0] + w.i * w.n + w.at + v * WIDTH, m);
  for (int64_t t = 0; t < w.t; t++, to += w.n) EACH(v, m) {
    const real *a = w.a + t * s[A_T] + v * WIDTH, *u = w.u + t * s[U_T] + v * WIDTH;
    __builtin_prefetch(a + AHEAD * s[A_T]), __builtin_prefetch(u + AHEAD * s[U_T]);
    vec now = load_some(u, m);
    if (!w.starts || !w.starts[t]) now += exponential(load_some(a, m)) * h[v];
    store_some(to + v * WIDTH, h[v] = now, m);
  }
}

static void backward_item(void **p, const int64_t *s, int64_t item) {
  place w = find(p, s, item);
  vec g[CHANNELS];
  EACH(v, m) g[v] = load_some((const real *)p[DLAST] + w.i * w.n + w.at + v * WIDTH, m);
  for (int64_t t = w.t - 1; t >= 0; t--) EACH(v, m) {
    int64_t here = (w.i * w.t + t) * w.n + w.at + v * WIDTH;
    const real *a_ = w.a + t * s[A_T] + v * WIDTH, *h_ = (const real *)p[H] + here - w.n;
    if (t == 0) h_ = (const real *)p[H0] + w.i * w.n + w.at + v * WIDTH;
    __builtin_prefetch(a_ - AHEAD * s[A_T]), __builtin_prefetch(h_ - AHEAD * w.n);
    __builtin_prefetch((const real *)p[DH] + here - AHEAD * w.n);
    g[v] += load_some((const real *)p[DH] + here, m);
    store_some((real *)p[DU] + here, g[v], m);
    int first = w.starts && w.starts[t];
    g[v] = first ? splat(0) : g[v] * exponential(load_some(a_, m));
    store_some((real *)p[DLOG_A] + here, first ? splat(0) : g[v] * load_some(h_, m), m);
  }
  EACH(v, m) store_some((real *)p[DH0] + w.i * w.n + w.at + v * WIDTH, g[v], m);
}

static int64_t items(const int64_t *s) {
  return s[N_B] * ((s[N_I] + CHANNELS * WIDTH - 1) / (CHANNELS * WIDTH));
}
void NAME(decay_forward)(void **p, const int64_t *s) {
  kizzasi_share(forward_item, p, s, items(s), s[THREADS]);
}
void NAME(decay_backward)(void **p, const int64_t *s) {
  kizzasi_share(backward_item, p, s, items(s), s[THREADS]);
}
