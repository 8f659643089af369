// Attention of one token's queries to keys and values in codes; see ops/coded_attention.py. An item
// is one head of keys and values of one row. What is decoded of TOKENS tokens stays in a core's
// cache, where all queries of the head read it.
#include "common.h"

enum { TOKENS = 32 };
enum { K, STEP, LEAST, V, V_SCALE, K_FIRST, V_FIRST, K_OPEN, V_OPEN, Q, Y, WORK, PAIRS };
enum { ROWS, QUERIES, DIM, DONE, OPEN, FIRST, GROUP, PART, BYTES, SLOTS, GROUPS, OPEN_SLOTS };
enum { FIRST_SLOTS = OPEN_SLOTS + 1, HALVES, THREADS };

// A scale has two bytes beside float32: bfloat16, the upper half of it.
#if BITS == 32
typedef uint16_t stored;
INLINE real scale_of(stored x) {
  uint32_t word = (uint32_t)x << 16;
  real y;
  memcpy(&y, &word, sizeof y);
  return y;
}
#else
typedef real stored;
INLINE real scale_of(stored x) { return x; }
#endif

// out = least + step code: of the n tokens of one group or a part of it.
static void by_channel(real *restrict out, const uint8_t *c, const stored *step, const stored *least,
                       const int64_t *s, int64_t n) {
  int64_t width = s[DIM], bytes = s[BYTES], rest = width - bytes;
  real by[width], from[width];
  for (int64_t j = 0; j < width; j++) by[j] = scale_of(step[j]), from[j] = scale_of(least[j]);
  for (int64_t t = 0; t < n; t++, c += bytes, out += width) {
    if (s[HALVES]) {
      for (int64_t j = 0; j < bytes; j++) out[j] = from[j] + by[j] * (real)(c[j] & 15);
      for (int64_t j = 0; j < rest; j++)
        out[bytes + j] = from[bytes + j] + by[bytes + j] * (real)(c[j] >> 4);
    } else {
      for (int64_t j = 0; j < width; j++) out[j] = from[j] + by[j] * (real)c[j];
    }
  }
}

// out = scale level[code], two codes a byte, or scale (code - 128): a scale for PART entries.
static void by_token(real *restrict out, const uint8_t *c, const stored *scale, const real *pairs,
                     const int64_t *s, int64_t n) {
  int64_t part = s[PART], parts = n * s[DIM] / part;
  for (int64_t g = 0; g < parts; g++, out += part) {
    real by = scale_of(scale[g]);
    if (s[HALVES]) {
      for (int64_t j = 0; j < part / 2; j++, c++) {
        const real *two = pairs + 2 * (int64_t)*c;
        out[2 * j] = by * two[0];
        out[2 * j + 1] = by * two[1];
      }
    } else {
      for (int64_t j = 0; j < part; j++) out[j] = by * ((real)c[j] - 128);
      c += part;
    }
  }
}

// Keys, or values, of tokens t and on, as many as lie together; how many those are.
static int64_t tile(real *out, void **p, const int64_t *s, int64_t item, int64_t t, int values) {
  int64_t width = s[DIM], end = s[DONE] + s[OPEN];
  const real *first = p[values ? V_FIRST : K_FIRST], *open = p[values ? V_OPEN : K_OPEN];
  int64_t n = (t < s[FIRST] ? s[FIRST] : t < s[DONE] ? s[DONE] : end) - t;
  n = n < TOKENS ? n : TOKENS;
  if (t < s[FIRST] || t >= s[DONE]) {
    int64_t at = t < s[FIRST] ? item * s[FIRST_SLOTS] + t : item * s[OPEN_SLOTS] + t - s[DONE];
    memcpy(out, (t < s[FIRST] ? first : open) + at * width, n * width * sizeof(real));
    return n;
  }
  int64_t slot = item * s[SLOTS] + t;
  const uint8_t *c = (const uint8_t *)p[values ? V : K] + slot * s[BYTES];
  if (values || !s[GROUP]) {
    const stored *scale = (const stored *)p[values ? V_SCALE : STEP] + slot * (width / s[PART]);
    by_token(out, c, scale, p[PAIRS], s, n);
    return n;
  }
  int64_t left = s[GROUP] - t % s[GROUP], at = (item * s[GROUPS] + t / s[GROUP]) * width;
  n = n < left ? n : left;
  by_channel(out, c, (const stored *)p[STEP] + at, (const stored *)p[LEAST] + at, s, n);
  return n;
}

INLINE real dot(const real *a, const real *b, int64_t n) {
  vec sum = splat(0);
  for (int64_t j = 0; j < n; j += WIDTH) {
    int64_t m = n - j < WIDTH ? n - j : WIDTH;
    sum += load_some(a + j, m) * load_some(b + j, m);
  }
  return total(sum);
}

// z = exp(z - max z) in place; their sum.
static real weights(real *z, int64_t n) {
  real most = z[0], sum = 0;
  for (int64_t i = 1; i < n; i++) most = z[i] > most ? z[i] : most;
  vec sums = splat(0);
  for (int64_t i = 0; i < n; i += WIDTH) {
    int64_t m = n - i < WIDTH ? n - i : WIDTH;
    vec w = exponential(load_some(z + i, m) - most);
    store_some(z + i, w, m);
    sums += load_some(z + i, m);
  }
  return sum + total(sums);
}

static void attend_item(void **p, const int64_t *s, int64_t item) {
  int64_t width = s[DIM], queries = s[QUERIES], end = s[DONE] + s[OPEN];
  real *z = (real *)p[WORK] + item * (TOKENS * width + queries * end), *x = z + queries * end;
  const real *q = (const real *)p[Q] + item * queries * width;
  real *y = (real *)p[Y] + item * queries * width, by = 1 / (real)sqrt((double)width);
  for (int64_t t = 0, n; t < end; t += n) {
    n = tile(x, p, s, item, t, 0);
    for (int64_t i = 0; i < queries; i++)
      for (int64_t k = 0; k < n; k++) z[i * end + t + k] = by * dot(q + i * width, x + k * width, width);
  }
  for (int64_t i = 0; i < queries; i++) {
    real sum = weights(z + i * end, end);
    for (int64_t t = 0; t < end; t++) z[i * end + t] /= sum;
  }
  memset(y, 0, queries * width * sizeof(real));
  for (int64_t t = 0, n; t < end; t += n) {
    n = tile(x, p, s, item, t, 1);
    for (int64_t i = 0; i < queries; i++)
      for (int64_t j = 0; j < width; j += WIDTH) {
        int64_t m = width - j < WIDTH ? width - j : WIDTH;
        vec sum = load_some(y + i * width + j, m);
        for (int64_t k = 0; k < n; k++) sum += z[i * end + t + k] * load_some(x + k * width + j, m);
        store_some(y + i * width + j, sum, m);
      }
  }
}

void NAME(kv_attend)(void **p, const int64_t *s) {
  kizzasi_share(attend_item, p, s, s[ROWS], s[THREADS]);
}
