// Products of weights with few vectors, which wait for the weights: see step.c.
#pragma once
#include "common.h"

enum { FETCH = 2048, SUMS = 8 };  // bytes that weights are asked for ahead of their use

// Sums of R rows of w with B vectors; U vectors of the machine at a time keep its adders busy;
// R B U <= SUMS.
INLINE void dots(const int R, const int B, const int U, const real *w, int64_t w_row,
                 const real *x, int64_t x_row, int64_t n, real *sums) {
  vec a[SUMS];  // a length that depends on R would keep them in memory
  for (int k = 0; k < R * B * U; k++) a[k] = splat(0);
  int64_t j = 0;
  for (; j + U * WIDTH <= n; j += U * WIDTH)
    for (int r = 0; r < R; r++) {
      const char *ahead = (const char *)(w + r * w_row + j) + FETCH;
      for (int k = 0; k < U * LANES * BITS / 8; k += 64) __builtin_prefetch(ahead + k);
      for (int u = 0; u < U; u++) {
        vec v = load(w + r * w_row + j + u * WIDTH);
        for (int b = 0; b < B; b++)
          a[(r * B + b) * U + u] += v * load(x + b * x_row + j + u * WIDTH);
      }
    }
  for (; j < n; j += WIDTH) {
    int64_t m = n - j < WIDTH ? n - j : WIDTH;
    for (int b = 0; b < B; b++) {
      vec v = load_some(x + b * x_row + j, m);
      for (int r = 0; r < R; r++) a[(r * B + b) * U] += v * load_some(w + r * w_row + j, m);
    }
  }
  for (int k = 0; k < R * B; k++) {
    for (int u = 1; u < U; u++) a[k * U] += a[k * U + u];
    sums[k] = total(a[k * U]);
  }
}

typedef struct {
  const real *w, *bias, *x;
  real *y;
  int64_t w_row, x_row, y_row, n;
} product;

INLINE void some_rows(const int R, const int B, const int U, const product *q, int64_t o) {
  real sums[SUMS];
  dots(R, B, U, q->w + o * q->w_row, q->w_row, q->x, q->x_row, q->n, sums);
  for (int b = 0; b < B; b++)
    for (int r = 0; r < R; r++)
      q->y[b * q->y_row + o + r] = sums[r * B + b] + (q->bias ? q->bias[o + r] : 0);
}
INLINE void rows_of(const int R, const int B, const int U, const product *q, int64_t first,
                    int64_t last) {
  int64_t o = first;
  for (; o + R <= last; o += R) some_rows(R, B, U, q, o);
  for (; o < last; o++) some_rows(1, B, U, q, o);
}

// Outputs first .. last - 1 of y = W x + bias for b vectors x.
INLINE void multiply(product q, int64_t b, int64_t first, int64_t last) {
  for (; b > 4; b -= 4, q.x += 4 * q.x_row, q.y += 4 * q.y_row) rows_of(2, 4, 1, &q, first, last);
  if (b == 4) rows_of(2, 4, 1, &q, first, last);
  if (b == 3) rows_of(2, 3, 1, &q, first, last);
  if (b == 2) rows_of(4, 2, 1, &q, first, last);
  if (b == 1) rows_of(4, 1, 2, &q, first, last);
}

enum { IDENTITY, SILU, SIGMOID, RELU, RELU2, GELU, GELU_TANH, GELU_QUICK, TANH };

INLINE vec activated(int64_t kind, vec v) {
  const vec zero = splat(0);
  switch (kind) {
    case SILU: return v * sigmoid(v);
    case SIGMOID: return sigmoid(v);
    case RELU: return choose((bits)(v < 0), zero, v);
    case RELU2: v = choose((bits)(v < 0), zero, v); return v * v;
    case GELU_TANH:  // x (1 + tanh(u)) / 2 = x sigmoid(2 u)
      return v * sigmoid((real)1.5957691216057308 * v * (1 + (real)0.044715 * v * v));
    case TANH: return 2 * sigmoid(2 * v) - 1;
    case GELU_QUICK: return v * sigmoid((real)1.702 * v);
    case GELU: {
      real x[LANES];
      store(x, v);
      for (int k = 0; k < LANES; k++)
        x[k] = (real)((double)x[k] * 0.5 * (1 + erf((double)x[k] * 0.7071067811865476)));
      return load(x);
    }
    default: return v;
  }
}

// Of instructions: rows of the batch, the first size; pointers by the names of their enums.
#define EACH(j, m, n) \
  for (int64_t j = 0, m; m = (n) - j < WIDTH ? (n) - j : WIDTH, j < (n); j += WIDTH)
#define EACH_ROW(i) for (int64_t i = 0; i < s[N_B]; i++)
#define IN(name) ((const real *)p[name])
#define OUT(name) ((real *)p[name])
enum { N_B };
