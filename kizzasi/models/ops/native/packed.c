// y = W x + bias for weights w = scale level + minimum, of 4 or 8 bits, with a scale and a minimum
// for every 32 inputs; b vectors at once, each group of levels opened once. See ops/packed.py.
#include "common.h"

enum { X, CODES, SCALE, MINIMUM, BIAS, Y, SUMS };  // SUMS: room for those of the groups of x
enum { N_B, N_OUT, N_IN, X_ROW, Y_ROW, N_BITS, THREADS };
enum { GROUP = 32, HALF = GROUP / 2, OUTPUTS = 32, FETCH = 1024, MOST = 4 };
#define EACH(j, m, n) \
  for (int64_t j = 0, m; m = (n) - j < WIDTH ? (n) - j : WIDTH, j < (n); j += WIDTH)

#if BITS == 32
typedef int32_t whole;
#else
typedef int64_t whole;
#endif
typedef whole wholes __attribute__((vector_size(LANES * sizeof(real))));
typedef uint8_t bytes __attribute__((vector_size(LANES)));
typedef int8_t signed_bytes __attribute__((vector_size(LANES)));

INLINE vec as_real(wholes v) { return __builtin_convertvector(v, vec); }
// 4 bits: byte j of a group holds level j and, above it, level j + 16.
INLINE wholes pairs_at(const uint8_t *p) {
#if defined(__AVX512F__) && BITS == 32  // compilers widen bytes one by one
  return (wholes)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__) && BITS == 32
  return (wholes)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
  bytes v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, wholes);
#endif
}
INLINE wholes levels_at(const uint8_t *p) {
#if defined(__AVX512F__) && BITS == 32
  return (wholes)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__) && BITS == 32
  return (wholes)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
  signed_bytes v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, wholes);
#endif
}

INLINE void output(const int B, const int four, void **p, const int64_t *s, int64_t b0, int64_t o) {
  int64_t groups = s[N_IN] / GROUP, size = four ? HALF : GROUP;
  const uint8_t *codes = (const uint8_t *)p[CODES] + o * groups * size;
  const real *scale = (const real *)p[SCALE] + o * groups, *least = (const real *)p[MINIMUM] + o * groups;
  const real *x = (const real *)p[X] + b0 * s[X_ROW], *sums = (const real *)p[SUMS] + b0 * groups;
  vec sum[MOST];  // a length that depends on B would keep them in memory
  for (int b = 0; b < B; b++) sum[b] = splat(0);
  for (int64_t g = 0; g < groups; g++, codes += size) {
    vec part[MOST];
    for (int b = 0; b < B; b++) part[b] = splat(0);
    __builtin_prefetch(codes + FETCH);
    for (int64_t j = 0; j < HALF; j += WIDTH) {
      vec low, high;
      if (four) {
        wholes q = pairs_at(codes + j);
        low = as_real(q & 15), high = as_real(q >> 4);
      } else {
        low = as_real(levels_at(codes + j)), high = as_real(levels_at(codes + HALF + j));
      }
      for (int b = 0; b < B; b++) {
        const real *at = x + b * s[X_ROW] + g * GROUP + j;
        part[b] += low * load(at);
        part[b] += high * load(at + HALF);
      }
    }
    for (int b = 0; b < B; b++) sum[b] += part[b] * scale[g];
  }
  for (int b = 0; b < B; b++) {
    EACH(g, m, groups) sum[b] += load_some(least + g, m) * load_some(sums + b * groups + g, m);
    real bias = p[BIAS] ? ((const real *)p[BIAS])[o] : 0;
    ((real *)p[Y])[(b0 + b) * s[Y_ROW] + o] = total(sum[b]) + bias;
  }
}

INLINE void outputs(const int B, void **p, const int64_t *s, int64_t b0, int64_t first, int64_t last) {
  if (s[N_BITS] == 4)
    for (int64_t o = first; o < last; o++) output(B, 1, p, s, b0, o);
  else
    for (int64_t o = first; o < last; o++) output(B, 0, p, s, b0, o);
}

static void item_of(void **p, const int64_t *s, int64_t item) {
  int64_t first = item * OUTPUTS, last = first + OUTPUTS < s[N_OUT] ? first + OUTPUTS : s[N_OUT];
  int64_t b0 = 0;
  for (; b0 + 4 <= s[N_B]; b0 += 4) outputs(4, p, s, b0, first, last);
  for (; b0 < s[N_B]; b0++) outputs(1, p, s, b0, first, last);
}

void NAME(packed)(void **p, const int64_t *s) {
  int64_t groups = s[N_IN] / GROUP;
  for (int64_t b = 0; b < s[N_B]; b++)
    for (int64_t g = 0; g < groups; g++) {
      const real *x = (const real *)p[X] + b * s[X_ROW] + g * GROUP;
      vec sum = splat(0);
      for (int64_t j = 0; j < GROUP; j += WIDTH) sum += load(x + j);
      ((real *)p[SUMS])[b * groups + g] = total(sum);
    }
  kizzasi_share(item_of, p, s, (s[N_OUT] + OUTPUTS - 1) / OUTPUTS, s[THREADS]);
}
