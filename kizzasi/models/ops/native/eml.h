// eml(x, y) = exp(x) - ln(y), guarded, on vectors: what eml_walk.c computes.
#pragma once
#include "common.h"

#define LN2_HIGH ((real)(BITS == 32 ? 6.9313812256e-01 : 6.93147180369123816490e-01))
#define LN2_LOW ((real)(BITS == 32 ? 9.0580006145e-06 : 1.90821492927058770002e-10))
#if BITS == 32
#define TINY 1.17549435e-38f
#define SIGN_BIT 0x80000000u
#define FRACTION 0x007fffffu
#define ONE_BITS 0x3f800000u
#define ROOT_HALF_BITS 0x3f3504f3u
#define TWO_MANTISSA 8388608.0f
#else
#define TINY 2.2250738585072014e-308
#define SIGN_BIT 0x8000000000000000u
#define FRACTION 0x000fffffffffffffu
#define ONE_BITS 0x3ff0000000000000u
#define ROOT_HALF_BITS 0x3fe6a09e667f3bcdu
#define TWO_MANTISSA 4503599627370496.0
#endif
#define EXP_LIMIT ((real)20)

INLINE vec magnitude(vec x) { return (vec)((bits)x & ~(word)SIGN_BIT); }

// The larger and the smaller; b where either is NaN.
#if defined(__AVX512F__) && BITS == 32
#define MAX(a, b) ((vec)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define MIN(a, b) ((vec)_mm512_min_ps((__m512)(a), (__m512)(b)))
#elif defined(__AVX512F__)
#define MAX(a, b) ((vec)_mm512_max_pd((__m512d)(a), (__m512d)(b)))
#define MIN(a, b) ((vec)_mm512_min_pd((__m512d)(a), (__m512d)(b)))
#elif defined(__AVX2__) && BITS == 32
#define MAX(a, b) ((vec)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define MIN(a, b) ((vec)_mm256_min_ps((__m256)(a), (__m256)(b)))
#elif defined(__AVX2__)
#define MAX(a, b) ((vec)_mm256_max_pd((__m256d)(a), (__m256d)(b)))
#define MIN(a, b) ((vec)_mm256_min_pd((__m256d)(a), (__m256d)(b)))
#else
#define MAX(a, b) choose((bits)((a) > (b)), a, b)
#define MIN(a, b) choose((bits)((a) < (b)), a, b)
#endif

// e^x of |x| < 80 (float) or 700 (double), NaN for NaN; within 1 unit in the last place.
INLINE vec bounded_exp(vec x) {
  vec s = x * LOG2E + MAGIC, r = s - MAGIC, f = (x - r * LN2_HIGH) - r * LN2_LOW, f2 = f * f;
  // (e^f - 1 - f) / f^2 on |f| <= ln(2) / 2: Chebyshev's, to 1e-16 and 7e-8; even and odd terms
#if BITS == 32
  vec even = splat(0.0013926183587713494542f) * f2 + 0.041666554617204574203f;
  vec odd = splat(0.0083631790527225773704f) * f2 + 0.16666576989698775683f;
  even = even * f2 + 0.5f;
#else
  vec odd = splat(2.5100385495510319078e-8) * f2 + 2.7557268459997064772e-6;
  vec even = splat(2.7620088445409748161e-7) * f2 + 0.000024801521295954375131;
  odd = odd * f2 + 0.00019841269863053616878;
  even = even * f2 + 0.0013888888917213716901;
  odd = odd * f2 + 0.0083333333333300618325;
  even = even * f2 + 0.041666666666624127873;
  odd = odd * f2 + 0.16666666666666667453;
  even = even * f2 + 0.50000000000000010221;
#endif
  vec p = (even + odd * f) * f2 + f;
  vec scale = (vec)(((bits)s + (word)EXPONENT_BIAS) << MANTISSA);
  return p * scale + scale;
}

// ln(x) of a normal positive number or infinity, within 1 unit in the last place.
//   x = 2^k m, m in [sqrt(1/2), sqrt(2)), f = m - 1, s = f / (2 + f):
//   ln(m) = 2 atanh(s) = f - f^2 / 2 + s (f^2 / 2 + R(s^2)).   Source: FreeBSD's e_log.c.
INLINE vec logarithm(vec x) {
  bits shifted = (bits)x + (word)(ONE_BITS - ROOT_HALF_BITS);
  vec k = (vec)((shifted >> MANTISSA) | (bits)splat(TWO_MANTISSA)) - (TWO_MANTISSA + EXPONENT_BIAS);
  vec f = (vec)((shifted & (word)FRACTION) + (word)ROOT_HALF_BITS) - 1;
  vec s = f / (f + 2), z = s * s, w = z * z, half = f * f * (real)0.5;
#if BITS == 32
  vec even = splat(0.24279078841f) * w + 0.40000972152f;
  vec odd = splat(0.28498786688f) * w + 0.66666662693f;
#else
  vec even = splat(1.531383769920937332e-01) * w + 2.222219843214978396e-01;
  vec odd = splat(1.479819860511658591e-01) * w + 1.818357216161805012e-01;
  even = even * w + 3.999999999940941908e-01;
  odd = odd * w + 2.857142874366239149e-01;
  odd = odd * w + 6.666666666666735130e-01;
#endif
  vec tail = s * (half + (odd + even * z) * z) + k * LN2_LOW;
  return k * LN2_HIGH - ((half - tail) - f) + (x - x);  // infinity becomes NaN
}

// One level of eml-core's chain: eml_safe(v c0 + c1, |v| + c2 + 1); NaN where v is infinite.
INLINE vec safe_node(vec v, vec c0, vec c1, vec c2) {
  vec x = MIN(splat(EXP_LIMIT), MAX(splat(-EXP_LIMIT), v * c0 + c1));
  vec y = (magnitude(v) + c2) + 1;
  return bounded_exp(x) - logarithm(MAX(y, splat(TINY)));
}
