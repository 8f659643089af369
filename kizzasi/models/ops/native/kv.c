// Keys and values of their codes; see kv_codes.py. An item is TOKENS tokens of one head of one row.
#include "common.h"

enum { TOKENS = 64 };
enum { CODES, SCALE, OUT, EXTRA };  // EXTRA: the least entries of channels, the levels of nf4
enum { N_ROWS, N_TOKENS, N_GROUP, N_WIDTH, N_BYTES, CODE_ROW, SCALE_ROW, OUT_ROW, HALVES, THREADS };

#define EACH_TOKEN(t) \
  int64_t items = (s[N_TOKENS] + TOKENS - 1) / TOKENS, row = item / items; \
  int64_t first = item % items * TOKENS; \
  int64_t end = first + TOKENS < s[N_TOKENS] ? first + TOKENS : s[N_TOKENS]; \
  int64_t width = s[N_WIDTH], bytes = s[N_BYTES]; \
  for (int64_t t = first; t < end; t++)

// out = least + step code: steps and least entries of each channel in each group of N_GROUP tokens.
static void channels_item(void **p, const int64_t *s, int64_t item) {
  EACH_TOKEN(t) {
    const uint8_t *c = (const uint8_t *)p[CODES] + row * s[CODE_ROW] + t * bytes;
    int64_t at = row * s[SCALE_ROW] + t / s[N_GROUP] * width;
    const real *restrict step = (const real *)p[SCALE] + at, *restrict least = (const real *)p[EXTRA] + at;
    real *restrict out = (real *)p[OUT] + row * s[OUT_ROW] + t * width;
    if (s[HALVES]) {
      for (int64_t j = 0; j < bytes; j++) out[j] = least[j] + step[j] * (real)(c[j] & 15);
      int64_t rest = width - bytes;
      for (int64_t j = 0; j < rest; j++)
        out[bytes + j] = least[bytes + j] + step[bytes + j] * (real)(c[j] >> 4);
    } else {
      for (int64_t j = 0; j < width; j++) out[j] = least[j] + step[j] * (real)c[j];
    }
  }
}

// out = scale level[code], two codes a byte, or scale (code - 128): a scale for N_GROUP entries.
static void tokens_item(void **p, const int64_t *s, int64_t item) {
  int64_t size = s[N_GROUP], groups = s[N_WIDTH] / size;
  const real *pairs = p[EXTRA];  // of every byte
  EACH_TOKEN(t) {
    const uint8_t *c = (const uint8_t *)p[CODES] + row * s[CODE_ROW] + t * bytes;
    const real *scale = (const real *)p[SCALE] + row * s[SCALE_ROW] + t * groups;
    real *restrict out = (real *)p[OUT] + row * s[OUT_ROW] + t * width;
    for (int64_t g = 0; g < groups; g++, out += size) {
      real by = scale[g];
      if (s[HALVES]) {
        for (int64_t j = 0; j < size / 2; j++, c++) {
          const real *two = pairs + 2 * (int64_t)*c;
          out[2 * j] = by * two[0];
          out[2 * j + 1] = by * two[1];
        }
      } else {
        for (int64_t j = 0; j < size; j++) out[j] = by * ((real)c[j] - 128);
        c += size;
      }
    }
  }
}

#define SHARE(item) \
  kizzasi_share(item, p, s, s[N_ROWS] * ((s[N_TOKENS] + TOKENS - 1) / TOKENS), s[THREADS])

void NAME(kv_channels)(void **p, const int64_t *s) { SHARE(channels_item); }
void NAME(kv_tokens)(void **p, const int64_t *s) { SHARE(tokens_item); }
