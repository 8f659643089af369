// Attention of one token over the keys and values of those before it: rotary turns, its own key and
// value written into the store, and what its queries make of all that they see. An item is the
// queries of one head of keys.
#include "common.h"

enum { HEADS, COS, SIN, STORE, CLOCK, SCORES, Y };
enum { N_B, N_H, N_KV, N_D, N_ROTATED, ROOM, WINDOW, N_GLOBAL, THREADS };
enum { PLACE, BEGIN };    // of the clock: of this token, and of the first that the tables hold
enum { SLOTS = 32, HELD = 8 };  // slots whose keys stay in the cache of a core; vectors held
#define EACH(j, m, n) \
  for (int64_t j = 0, m; m = (n) - j < WIDTH ? (n) - j : WIDTH, j < (n); j += WIDTH)

static int64_t seen(const int64_t *s, int64_t place) {
  int64_t most = s[WINDOW] + s[N_GLOBAL];
  return s[WINDOW] && place + 1 > most ? most : place + 1;
}

// x[j] cos[j] + x[j - n / 2] sin[j] of every query and key
static void turn(real *x, const real *cos, const real *sin, int64_t n, real *room) {
  memcpy(room, x, (size_t)n * sizeof(real));
  int64_t half = n / 2, rest = n - half;
  for (int64_t j = 0; j < half; j++) x[j] = room[j] * cos[j] + room[j + rest] * sin[j];
  for (int64_t j = half; j < n; j++) x[j] = room[j] * cos[j] + room[j - half] * sin[j];
}

static void attend(const real *q, const real *k, const real *v, real *score, real *y, int64_t n,
                   int64_t d, int64_t queries) {
  real by = (real)(1 / sqrt((double)d));
  for (int64_t first = 0; first < n; first += SLOTS)
    for (int64_t r = 0; r < queries; r++)
      for (int64_t t = first; t < n && t < first + SLOTS; t++) {
        vec sum = splat(0);
        EACH(j, m, d) sum += load_some(q + r * d + j, m) * load_some(k + t * d + j, m);
        score[r * n + t] = total(sum) * by;
      }
  for (int64_t r = 0; r < queries; r++) {
    real *to = score + r * n, most = to[0];
    for (int64_t t = 1; t < n; t++) most = to[t] > most ? to[t] : most;
    vec sum = splat(0);
    EACH(t, m, n) {
      vec e = exponential(load_some(to + t, m) - most);
      store_some(to + t, e, m);
      for (int64_t l = m; l < WIDTH; l++) e[l] = 0;
      sum += e;
    }
    real share = 1 / total(sum);
    EACH(t, m, n) store_some(to + t, load_some(to + t, m) * share, m);
  }
  memset(y, 0, (size_t)(queries * d) * sizeof(real));
  for (int64_t first = 0; first < n; first += SLOTS) {
    int64_t last = first + SLOTS < n ? first + SLOTS : n;
    for (int64_t r = 0; r < queries; r++)
      for (int64_t at = 0; at < d; at += HELD * WIDTH) {
        real *to = y + r * d + at;
        if (d - at >= HELD * WIDTH) {
          vec sum[HELD];
          for (int h = 0; h < HELD; h++) sum[h] = load(to + h * WIDTH);
          for (int64_t t = first; t < last; t++) {
            const real *from = v + t * d + at;
            for (int h = 0; h < HELD; h++) sum[h] += load(from + h * WIDTH) * score[r * n + t];
          }
          for (int h = 0; h < HELD; h++) store(to + h * WIDTH, sum[h]);
        } else {
          EACH(j, m, d - at) {
            vec sum = load_some(to + j, m);
            for (int64_t t = first; t < last; t++)
              sum += load_some(v + t * d + at + j, m) * score[r * n + t];
            store_some(to + j, sum, m);
          }
        }
      }
  }
}

static void attend_item(void **p, const int64_t *s, int64_t item) {
  int64_t kv = s[N_KV], d = s[N_D], b = item / kv, i = item % kv, per = s[N_H] / kv;
  int64_t heads = s[N_H] + 2 * kv, place = ((const int64_t *)p[CLOCK])[PLACE];
  int64_t g = s[N_GLOBAL], slot = place, n = seen(s, place), turned = s[N_ROTATED];
  if (s[WINDOW] && place >= g) slot = (place - g) % s[WINDOW] + g;
  real *q = (real *)p[HEADS] + (b * heads + i * per) * d;
  real *k = (real *)p[HEADS] + (b * heads + s[N_H] + i) * d, *v = k + kv * d;
  real *keys = (real *)p[STORE] + (b * 2 * kv + i) * s[ROOM] * d, *values = keys + kv * s[ROOM] * d;
  real *score = (real *)p[SCORES] + item * per * s[ROOM];
  if (turned) {
    real *room = (real *)p[Y] + (b * s[N_H] + i * per) * d;  // filled afterwards
    int64_t row = (place - ((const int64_t *)p[CLOCK])[BEGIN]) * turned;
    const real *cos = (const real *)p[COS] + row, *sin = (const real *)p[SIN] + row;
    for (int64_t r = 0; r < per; r++) turn(q + r * d, cos, sin, turned, room);
    turn(k, cos, sin, turned, room);
  }
  memcpy(keys + slot * d, k, (size_t)d * sizeof(real));
  memcpy(values + slot * d, v, (size_t)d * sizeof(real));
  attend(q, keys, values, score, (real *)p[Y] + (b * s[N_H] + i * per) * d, n, d, per);
}

void NAME(attend_step)(void **p, const int64_t *s) {
  int64_t items = s[N_B] * s[N_KV], n = seen(s, ((const int64_t *)p[CLOCK])[PLACE]);
  int64_t worth = items * n * s[N_D] / (1 << 18);
  kizzasi_share(attend_item, p, s, items, worth < s[THREADS] ? worth : s[THREADS]);
}
