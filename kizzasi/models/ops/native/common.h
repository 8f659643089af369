// What all kernels share. A source is compiled once for each dtype and instruction set:
//
//   REAL    float or double, BITS its width
//   LANES   numbers in a vector: 1 for the scalar build
//   NAME(f) the exported name, which says both
//
// Vectors are those of the compiler (GCC, clang); intrinsics stand only where they save something.
// A kernel takes an array of pointers and an array of sizes, in an order that its Python twin knows.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define GLUE_(name, suffix) kizzasi_##name##_##suffix
#define GLUE(name, suffix) GLUE_(name, suffix)
#define NAME(name) GLUE(name, SUFFIX)
#define INLINE static inline __attribute__((always_inline))

typedef REAL real;
#if BITS == 32
typedef uint32_t word;
#define MANTISSA 23
#define EXPONENT_BIAS 127
#define MAGIC 12582912.0f  // 1.5 2^23: added and taken off again, it rounds to whole numbers
#define AVX2(f) _mm256_##f##_ps
#define SIDE __m256
#else
typedef uint64_t word;
#define MANTISSA 52
#define EXPONENT_BIAS 1023
#define MAGIC 6755399441055744.0
#define AVX2(f) _mm256_##f##_pd
#define SIDE __m256d
#endif
typedef real vec __attribute__((vector_size(LANES * sizeof(real))));
typedef word bits __attribute__((vector_size(LANES * sizeof(real))));

#define LOG2E ((real)1.4426950408889634)
#define WIDTH ((int64_t)LANES)
#define IS_WIDE(m) __builtin_expect((m) == WIDTH, 1)

typedef void (*work)(void **p, const int64_t *s, int64_t item);
// Does all items, on `threads` threads; see threads.c.
void kizzasi_share(work f, void **p, const int64_t *s, int64_t items, int64_t threads);

INLINE vec load(const real *p) { vec v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(real *p, vec v) { memcpy(p, &v, sizeof v); }
INLINE vec splat(real x) { return x - (vec){}; }

// The first m <= LANES numbers; zeros in the others.
INLINE vec load_some(const real *p, int64_t m) {
  if (IS_WIDE(m)) return load(p);
  real x[LANES] = {0};
  for (int64_t k = 0; k < m; k++) x[k] = p[k];
  return load(x);
}
INLINE void store_some(real *p, vec v, int64_t m) {
  if (IS_WIDE(m)) { store(p, v); return; }
  real x[LANES];
  store(x, v);
  for (int64_t k = 0; k < m; k++) p[k] = x[k];
}
// The same with `step` numbers between two of them: columns.
INLINE vec gather(const real *p, int64_t step, int64_t m) {
  real x[LANES] = {0};
  for (int64_t k = 0; k < m; k++) x[k] = p[k * step];
  return load(x);
}
INLINE void scatter(real *p, int64_t step, vec v, int64_t m) {
  real x[LANES];
  store(x, v);
  for (int64_t k = 0; k < m; k++) p[k * step] = x[k];
}

INLINE real total(vec v) {
#if defined(__AVX512F__) && BITS == 32
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX512F__)
  return _mm512_reduce_add_pd((__m512d)v);
#elif defined(__AVX2__) && BITS == 32
  __m128 x = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
#elif defined(__AVX2__)
  __m128d x = _mm256_castpd256_pd128((__m256d)v);
  x = _mm_add_pd(x, _mm256_extractf128_pd((__m256d)v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
#else
  real x[LANES];
  store(x, v);
  for (int w = LANES / 2; w; w /= 2)
    for (int k = 0; k < w; k++) x[k] += x[k + w];
  return x[0];
#endif
}

INLINE vec choose(bits where, vec yes, vec no) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (vec)AVX2(blendv)((SIDE)no, (SIDE)yes, (SIDE)where);
#else
  return (vec)(((bits)yes & where) | ((bits)no & ~where));
#endif
}
// x where it is larger, smaller or NaN.
INLINE vec at_least(real low, vec x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (vec)AVX2(max)((SIDE)splat(low), (SIDE)x);
#else
  return choose((bits)(x < low), splat(low), x);
#endif
}
INLINE vec at_most(real high, vec x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (vec)AVX2(min)((SIDE)splat(high), (SIDE)x);
#else
  return choose((bits)(x > high), splat(high), x);
#endif
}

// 2^x. Zero far below the smallest normal number, infinity above the largest, NaN for NaN.
INLINE vec power2(vec x) {
#if defined(__AVX512F__) && BITS == 32
  __m512 y = _mm512_max_ps(_mm512_set1_ps(-1e4f), (__m512)x);  // NaN is the second operand
  vec r = (vec)_mm512_roundscale_ps(y, 0x08), f = (vec)y - r;
#elif defined(__AVX512F__)
  __m512d y = _mm512_max_pd(_mm512_set1_pd(-1e4), (__m512d)x);
  vec r = (vec)_mm512_roundscale_pd(y, 0x08), f = (vec)y - r;
#else
  // At the ends the scale itself is 0 and infinity.
  vec y = at_least(-EXPONENT_BIAS, at_most(EXPONENT_BIAS + 1, x));
  vec s = y + (MAGIC + EXPONENT_BIAS), r = s - (MAGIC + EXPONENT_BIAS), f = y - r;
#endif
#if BITS == 32
  vec p = splat(1.535336188e-4f);
  p = p * f + 1.339887440e-3f;
  p = p * f + 9.618437358e-3f;
  p = p * f + 5.550332471e-2f;
  p = p * f + 2.402264791e-1f;
  p = p * f + 6.931472029e-1f;
#else
  vec p = splat(2.56784359934882e-11);  // ln(2)^k / k!
  p = p * f + 4.44553827187081e-10;
  p = p * f + 7.05491162080112e-09;
  p = p * f + 1.01780860092397e-07;
  p = p * f + 1.32154867901443e-06;
  p = p * f + 1.525273380405984e-05;
  p = p * f + 0.0001540353039338161;
  p = p * f + 0.001333355814642844;
  p = p * f + 0.009618129107628477;
  p = p * f + 0.05550410866482158;
  p = p * f + 0.2402265069591007;
  p = p * f + 0.6931471805599453;
#endif
  p = p * f + (real)1;
#if defined(__AVX512F__) && BITS == 32
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)r);
#elif defined(__AVX512F__)
  return (vec)_mm512_scalef_pd((__m512d)p, (__m512d)r);
#else
  return p * (vec)((bits)s << MANTISSA);
#endif
}

INLINE vec exponential(vec x) { return power2(x * LOG2E); }
INLINE vec sigmoid(vec x) { return 1 / (1 + exponential(-x)); }

// log(1 + exp(x)), and x itself above 20, as torch has it.
INLINE vec softplus(vec x) {
  bits positive = (bits)(x > 0);
  vec w = exponential(choose(positive, -x, x));  // in (0, 1]
  vec q = w / (2 + w), q2 = q * q;              // log(1 + w) = 2 atanh(q), q <= 1/3
#if BITS == 32
  enum { TERMS = 8 };
#else
  enum { TERMS = 17 };
#endif
  vec sum = splat((real)1 / (2 * TERMS + 1));
  for (int k = TERMS - 1; k >= 0; k--) sum = sum * q2 + (real)1 / (2 * k + 1);
  vec y = choose(positive, x, splat(0)) + 2 * q * sum;
  return choose((bits)(x > 20), x, y);
}

INLINE real *room(int64_t numbers) {
  size_t bytes = ((size_t)numbers * sizeof(real) + 127) / 64 * 64;
  void *p = NULL;
  return posix_memalign(&p, 64, bytes) ? NULL : (real *)p;
}
