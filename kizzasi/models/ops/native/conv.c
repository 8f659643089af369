// The short causal convolution of ops/conv.py with SiLU, forward and backward.
//
// Vectors run over channels. An item is one row of the batch and CHANNELS vectors, which go through
// time in blocks of STEPS tokens, so that rows are read in runs. The last k inputs, and in backward
// the k unfinished gradients, are in registers for the usual k.
#include "common.h"

enum { CHANNELS = 8, STEPS = 32, LONGEST = 32 };
enum { X, TAPS, BIAS, BEFORE, STARTS, Y, DX = Y, DTAPS, DBIAS, DBEFORE, DY };
enum { N_B, N_T, N_C, N_K, X_B, X_T, DY_B, DY_T, SILU, THREADS };

typedef struct {
  vec x[LONGEST], w[LONGEST];    // by lag: 0 is the present token
  vec dx[LONGEST], dw[LONGEST];  // dx: of the inputs in x, so far
  vec bias, dbias;
} channels;

static int64_t parts_of(const int64_t *s) {
  return (s[N_C] + CHANNELS * WIDTH - 1) / (CHANNELS * WIDTH);
}

static void open_channels(channels *o, void **p, const int64_t *s, int64_t i, int64_t at, int64_t m) {
  int64_t c = s[N_C], k = s[N_K];
  memset(o, 0, sizeof *o);
  o->bias = load_some((const real *)p[BIAS] + at, m);
  for (int64_t l = 0; l < k; l++) {
    o->w[l] = load_some((const real *)p[TAPS] + (k - 1 - l) * c + at, m);
    if (l < k - 1)  // what is now at lag l will be at l + 1 when the first token is read
      o->x[l] = load_some((const real *)p[BEFORE] + (i * (k - 1) + k - 2 - l) * c + at, m);
  }
}

// How many tokens back, k - 1 at most, token t sees; `reach` is that of the token before.
INLINE int64_t look_back(const uint8_t *starts, int64_t t, int64_t reach, int64_t k) {
  if (!starts) return k - 1;
  if (starts[t]) return 0;
  return reach < k - 1 ? reach + 1 : k - 1;
}

INLINE void push(vec *x, const int k, vec newest) {
  for (int l = k - 1; l > 0; l--) x[l] = x[l - 1];
  x[0] = newest;
}

INLINE vec filter(const vec *x, const vec *w, const int k, vec bias, int64_t reach) {
  vec y = bias;
  for (int l = k - 1; l >= 0; l--)
    if (l <= reach) y += w[l] * x[l];
  return y;
}

// What a run of tokens of one vector of channels reads and writes.
typedef struct {
  const real *x, *dy;
  real *y, *dbefore;  // y is dx in backward
  int64_t x_t, dy_t, c, t0, steps, m;
  const int64_t *reach;
  int silu;
} run;

INLINE void forward_run(const int k, channels *o, const run *r) {
  vec x[LONGEST], w[LONGEST];
  for (int l = 0; l < k; l++) x[l] = o->x[l], w[l] = o->w[l];
  for (int64_t t = r->t0; t < r->t0 + r->steps; t++) {
    __builtin_prefetch(r->x + (t + STEPS) * r->x_t);
    __builtin_prefetch(r->y + (t + STEPS) * r->c, 1);
    push(x, k, load_some(r->x + t * r->x_t, r->m));
    vec y = filter(x, w, k, o->bias, r->reach[t - r->t0]);
    if (r->silu) y *= sigmoid(y);
    store_some(r->y + t * r->c, y, r->m);
  }
  for (int l = 0; l < k; l++) o->x[l] = x[l];
}

// Where the gradient of token t goes; those before the first are the state's.
INLINE real *place_of(const run *r, int64_t t, int64_t k) {
  return t >= 0 ? r->y + t * r->c : r->dbefore + (t + k - 1) * r->c;
}

INLINE void backward_run(const int k, channels *o, const run *r) {
  vec x[LONGEST], w[LONGEST], dx[LONGEST], dw[LONGEST], dbias = o->dbias;
  for (int l = 0; l < k; l++) x[l] = o->x[l], w[l] = o->w[l], dx[l] = o->dx[l], dw[l] = o->dw[l];
  for (int64_t t = r->t0; t < r->t0 + r->steps; t++) {
    __builtin_prefetch(r->x + (t + STEPS) * r->x_t);
    __builtin_prefetch(r->dy + (t + STEPS) * r->dy_t);
    __builtin_prefetch(r->y + (t + STEPS) * r->c, 1);
    int64_t reach = r->reach[t - r->t0];
    push(x, k, load_some(r->x + t * r->x_t, r->m));
    push(dx, k, splat(0));
    vec g = load_some(r->dy + t * r->dy_t, r->m);
    if (r->silu) {
      vec y = filter(x, w, k, o->bias, reach), on = sigmoid(y);
      g *= on + y * on * (1 - on);
    }
    dbias += g;
    for (int l = 0; l < k; l++)
      if (l <= reach) dw[l] += g * x[l], dx[l] += g * w[l];
    store_some(place_of(r, t - (k - 1), k), dx[k - 1], r->m);
  }
  for (int l = 0; l < k; l++) o->x[l] = x[l], o->dx[l] = dx[l], o->dw[l] = dw[l];
  o->dbias = dbias;
}

INLINE void each_block(void **p, const int64_t *s, int64_t item, const int backward) {
  int64_t T = s[N_T], c = s[N_C], k = s[N_K], parts = parts_of(s), i = item / parts;
  int64_t first = item % parts * CHANNELS * WIDTH, left = c - first, reach[STEPS], last = k - 1;
  int64_t vectors = left < CHANNELS * WIDTH ? (left + WIDTH - 1) / WIDTH : CHANNELS;
  const uint8_t *starts = p[STARTS] ? (const uint8_t *)p[STARTS] + i * T : NULL;
  channels *o = (channels *)room(CHANNELS * (int64_t)(sizeof(channels) / sizeof(real)));
  run r = {.x_t = s[X_T], .dy_t = s[DY_T], .c = c, .silu = (int)s[SILU], .reach = reach};
#define EACH(v) for (int64_t v = 0, at = first; v < vectors; v++, at += WIDTH)
#define POINT(at)                                                                             \
  r.m = c - (at) < WIDTH ? c - (at) : WIDTH, r.x = (const real *)p[X] + i * s[X_B] + (at),    \
  r.y = (real *)p[Y] + i * T * c + (at);                                                      \
  if (backward) r.dy = (const real *)p[DY] + i * s[DY_B] + (at),                              \
                r.dbefore = (real *)p[DBEFORE] + i * (k - 1) * c + (at)
  EACH(v) open_channels(o + v, p, s, i, at, c - at < WIDTH ? c - at : WIDTH);
  for (r.t0 = 0; r.t0 < T; r.t0 += STEPS) {
    r.steps = T - r.t0 < STEPS ? T - r.t0 : STEPS;
    for (int64_t t = 0; t < r.steps; t++)
      reach[t] = last = look_back(starts, r.t0 + t, last, k);
    EACH(v) {
      POINT(at);
#define RUN(K) (backward ? backward_run(K, o + v, &r) : forward_run(K, o + v, &r))
      if (k == 4) RUN(4); else if (k == 3) RUN(3); else if (k == 2) RUN(2); else RUN((int)k);
    }
  }
  if (backward) EACH(v) {
    POINT(at);
    for (int64_t l = 0; l < k - 1; l++) store_some(place_of(&r, T - 1 - l, k), o[v].dx[l], r.m);
    for (int64_t l = 0; l < k; l++)
      store_some((real *)p[DTAPS] + (i * k + k - 1 - l) * c + at, o[v].dw[l], r.m);
    store_some((real *)p[DBIAS] + i * c + at, o[v].dbias, r.m);
  }
  free(o);
}

static void forward_item(void **p, const int64_t *s, int64_t item) { each_block(p, s, item, 0); }
static void backward_item(void **p, const int64_t *s, int64_t item) { each_block(p, s, item, 1); }

void NAME(conv_forward)(void **p, const int64_t *s) {
  kizzasi_share(forward_item, p, s, s[N_B] * parts_of(s), s[THREADS]);
}
void NAME(conv_backward)(void **p, const int64_t *s) {
  kizzasi_share(backward_item, p, s, s[N_B] * parts_of(s), s[THREADS]);
}
