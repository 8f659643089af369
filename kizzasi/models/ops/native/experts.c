// What stands between the products of jobs that are sorted by expert: the gates of their rows,
// forward and backward, and the sums of rows by token. An item is ROWS rows, or a share of the
// tokens.
#include "common.h"

enum { ROWS = 16 };
enum { BOTH, WEIGHT, HIDDEN, D_HIDDEN = 2, WEIGHTED, D_BOTH, D_WEIGHT };
enum { N_ROWS, N_H, THREADS };
enum { Y, TOKEN, FROM };
enum { N_JOBS, N_D, N_TOKENS, SHARES };

#define EACH(j, m, n) \
  for (int64_t j = 0, m; m = (n) - j < WIDTH ? (n) - j : WIDTH, j < (n); j += WIDTH)
#define EACH_ROW(i) \
  for (int64_t i = item * ROWS, end = i + ROWS < s[N_ROWS] ? i + ROWS : s[N_ROWS]; i < end; i++)

static void gate_item(void **p, const int64_t *s, int64_t item) {
  int64_t h = s[N_H];
  EACH_ROW(i) {
    const real *a = (const real *)p[BOTH] + i * 2 * h, *c = a + h;
    real w = ((const real *)p[WEIGHT])[i], *to = (real *)p[HIDDEN] + i * h;
    EACH(j, m, h) {
      vec v = load_some(a + j, m);
      store_some(to + j, v * sigmoid(v) * load_some(c + j, m) * w, m);
    }
  }
}

static void slope_item(void **p, const int64_t *s, int64_t item) {
  int64_t h = s[N_H];
  EACH_ROW(i) {
    const real *a = (const real *)p[BOTH] + i * 2 * h, *c = a + h;
    const real *dy = (const real *)p[D_HIDDEN] + i * h;
    real w = ((const real *)p[WEIGHT])[i], *hidden = (real *)p[WEIGHTED] + i * h;
    real *da = (real *)p[D_BOTH] + i * 2 * h, *dc = da + h;
    vec sum = splat(0);
    EACH(j, m, h) {
      vec v = load_some(a + j, m), up = load_some(c + j, m), g = load_some(dy + j, m);
      vec r = sigmoid(v), silu = v * r, gw = g * w;
      sum += g * silu * up;
      store_some(hidden + j, silu * up * w, m);
      store_some(da + j, gw * up * (r + silu * (1 - r)), m);
      store_some(dc + j, gw * silu, m);
    }
    ((real *)p[D_WEIGHT])[i] = total(sum);
  }
}

static void add_item(void **p, const int64_t *s, int64_t item) {
  int64_t d = s[N_D], n = s[N_TOKENS], shares = s[SHARES];
  int64_t first = n * item / shares, last = n * (item + 1) / shares;
  const int64_t *token = p[TOKEN];
  for (int64_t i = 0; i < s[N_JOBS]; i++) {
    if (token[i] < first || token[i] >= last) continue;
    const real *from = (const real *)p[FROM] + i * d;
    real *y = (real *)p[Y] + token[i] * d;
    EACH(j, m, d) store_some(y + j, load_some(y + j, m) + load_some(from + j, m), m);
  }
}

void NAME(experts_gate)(void **p, const int64_t *s) {
  kizzasi_share(gate_item, p, s, (s[N_ROWS] + ROWS - 1) / ROWS, s[THREADS]);
}
void NAME(experts_slope)(void **p, const int64_t *s) {
  kizzasi_share(slope_item, p, s, (s[N_ROWS] + ROWS - 1) / ROWS, s[THREADS]);
}
void NAME(experts_add)(void **p, const int64_t *s) {
  kizzasi_share(add_item, p, s, s[SHARES], s[SHARES]);
}
