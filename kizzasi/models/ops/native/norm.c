// RMS norm over rows: y = w x / sqrt(mean(x^2) + eps), forward and backward. An item is ROWS rows,
// whose share of the weight's gradient goes to a row of its own.
#include "common.h"

enum { ROWS = 64 };
enum { X, WEIGHT, EPS, Y, DY = 3, DX, DWEIGHT };
enum { N_ROWS, N_D, X_ROW, DY_ROW, THREADS };

#define EACH(j, m) \
  for (int64_t j = 0, m; m = d - j < WIDTH ? d - j : WIDTH, j < d; j += WIDTH)

INLINE real scale_of(const real *x, int64_t d, double eps) {
  vec sum = splat(0);
  EACH(j, m) { vec v = load_some(x + j, m); sum += v * v; }
  return (real)(1 / sqrt((double)total(sum) / (double)d + eps));
}

static void forward_item(void **p, const int64_t *s, int64_t item) {
  int64_t d = s[N_D], end = (item + 1) * ROWS < s[N_ROWS] ? (item + 1) * ROWS : s[N_ROWS];
  const real *w = p[WEIGHT];
  for (int64_t i = item * ROWS; i < end; i++) {
    const real *x = (const real *)p[X] + i * s[X_ROW];
    real r = scale_of(x, d, *(const double *)p[EPS]), *y = (real *)p[Y] + i * d;
    EACH(j, m) store_some(y + j, load_some(x + j, m) * load_some(w + j, m) * r, m);
  }
}

static void backward_item(void **p, const int64_t *s, int64_t item) {
  int64_t d = s[N_D], end = (item + 1) * ROWS < s[N_ROWS] ? (item + 1) * ROWS : s[N_ROWS];
  const real *w = p[WEIGHT];
  real *dw = (real *)p[DWEIGHT] + item * d;
  memset(dw, 0, (size_t)d * sizeof(real));
  for (int64_t i = item * ROWS; i < end; i++) {
    const real *x = (const real *)p[X] + i * s[X_ROW], *dy = (const real *)p[DY] + i * s[DY_ROW];
    real r = scale_of(x, d, *(const double *)p[EPS]), *dx = (real *)p[DX] + i * d;
    vec sum = splat(0);
    EACH(j, m) {
      vec xj = load_some(x + j, m), g = load_some(dy + j, m);
      sum += g * load_some(w + j, m) * xj;
      store_some(dw + j, load_some(dw + j, m) + g * xj * r, m);
    }
    real mean = total(sum) / (real)d * r * r;
    EACH(j, m) {
      vec g = load_some(dy + j, m) * load_some(w + j, m);
      store_some(dx + j, (g - load_some(x + j, m) * mean) * r, m);
    }
  }
}

void NAME(norm_forward)(void **p, const int64_t *s) {
  kizzasi_share(forward_item, p, s, (s[N_ROWS] + ROWS - 1) / ROWS, s[THREADS]);
}
void NAME(norm_backward)(void **p, const int64_t *s) {
  kizzasi_share(backward_item, p, s, (s[N_ROWS] + ROWS - 1) / ROWS, s[THREADS]);
}
void NAME(norm_sizes)(void **p, const int64_t *s) {
  ((int64_t *)p[0])[0] = (s[N_ROWS] + ROWS - 1) / ROWS;
}
