// Instructions of a program (step.c): one token through memories that are matrices.
#include "step.h"

// Mamba-2: dt = clamp(softplus(dt + bias)), h = exp(dt A) h + dt u B, y = h C + D u; h (b, h, p, n)
enum { D_U, D_DT, D_BIAS, D_A, D_D, D_B, D_C, D_LIMITS, D_H, D_Y };
enum { D_HEADS = 1, D_P, D_GROUPS, D_N, D_U_ROW, D_BC_ROW, D_DT_ROW };
void NAME(step_ssd)(void **p, const int64_t *s) {
  int64_t heads = s[D_HEADS], P = s[D_P], n = s[D_N], per_group = heads / s[D_GROUPS];
  const double *limits = p[D_LIMITS];
  EACH_ROW(i) for (int64_t k = 0; k < heads; k++) {
    real dt[LANES];
    store(dt, softplus(splat(IN(D_DT)[i * s[D_DT_ROW] + k] + IN(D_BIAS)[k])));
    real step = dt[0] < (real)limits[0] ? (real)limits[0] : dt[0];
    step = step > (real)limits[1] ? (real)limits[1] : step;
    vec decay = exponential(splat(step * IN(D_A)[k]));
    int64_t at = i * s[D_BC_ROW] + k / per_group * n;
    const real *u = IN(D_U) + i * s[D_U_ROW] + k * P, *B = IN(D_B) + at, *C = IN(D_C) + at;
    real *h = OUT(D_H) + (i * heads + k) * P * n, *y = OUT(D_Y) + (i * heads + k) * P;
    for (int64_t c = 0; c < P; c++, h += n) {
      real w = step * u[c];
      vec sum = splat(0);
      EACH(j, m, n) {
        vec v = decay * load_some(h + j, m) + w * load_some(B + j, m);
        store_some(h + j, v, m);
        sum += v * load_some(C + j, m);
      }
      y[c] = total(sum) + IN(D_D)[k] * u[c];
    }
  }
}

INLINE real squares(const real *x, int64_t n) {
  vec sum = splat(0);
  EACH(j, m, n) { vec v = load_some(x + j, m); sum += v * v; }
  return total(sum);
}

// The delta rule of keys of length 1: h = exp(-A softplus(a + bias)) h, then
// h += k (sigmoid(b) by (v - k h)) and y = q h / sqrt(n); h (b, heads, n, p). Queries, keys (a head
// of each for `per` heads of values) and values lie side by side, as do b and a of a head of keys.
enum { T_QKV, T_BA, T_A, T_BIAS, T_BY, T_H, T_Y };
enum { T_HEADS = 1, T_KEYS, T_N, T_P, T_QKV_ROW, T_BA_ROW };
void NAME(step_delta)(void **p, const int64_t *s) {
  int64_t heads = s[T_HEADS], n = s[T_N], P = s[T_P], per = heads / s[T_KEYS], fades = p[T_A] != 0;
  EACH_ROW(i) for (int64_t k = 0; k < heads; k++) {
    const real *from = IN(T_QKV) + i * s[T_QKV_ROW], *q = from + k / per * n;
    const real *key = q + s[T_KEYS] * n, *v = from + 2 * s[T_KEYS] * n + k * P;
    const real *ba = IN(T_BA) + i * s[T_BA_ROW] + k / per * per * (1 + fades) + k % per;
    real *h = OUT(T_H) + (i * heads + k) * n * P, *y = OUT(T_Y) + (i * heads + k) * P;
    real by_q = 1 / (real)sqrt((double)((squares(q, n) + (real)1e-6) * (real)n));
    real by_k = 1 / (real)sqrt((double)(squares(key, n) + (real)1e-6));
    real rate[LANES], kept[LANES];
    store(rate, sigmoid(splat(*ba)) * (real)*(const double *)p[T_BY]);
    store(kept, fades ? exponential(-IN(T_A)[k] * softplus(splat(ba[per] + IN(T_BIAS)[k]))) : splat(1));
    EACH(j, m, P) {
      vec found = splat(0), read = splat(0);
      for (int64_t c = 0; c < n; c++) found += load_some(h + c * P + j, m) * key[c];
      vec u = (load_some(v + j, m) - found * (by_k * kept[0])) * (rate[0] * by_k);
      for (int64_t c = 0; c < n; c++) {
        vec now = load_some(h + c * P + j, m) * kept[0] + u * key[c];
        store_some(h + c * P + j, now, m);
        read += now * q[c];
      }
      store_some(y + j, read * by_q, m);
    }
  }
}

// Linear attention: h = kept h + to k v and y = by q h, for h (b, heads, n, p); kept is a number for
// each head, or sigmoid(g)^power, written into g. With turns, cosines and sines (2, n / 2), the rows
// j and j + n / 2 of h are turned afterwards.
enum { L_Q, L_K, L_V, L_KEPT, L_G, L_TURNS, L_SCALES, L_H, L_Y };
enum { L_HEADS = 1, L_N, L_P, L_Q_ROW, L_K_ROW, L_V_ROW };
void NAME(step_linear)(void **p, const int64_t *s) {
  int64_t heads = s[L_HEADS], n = s[L_N], P = s[L_P], half = n / 2;
  const double *scales = p[L_SCALES];
  real by = (real)scales[0], to = (real)scales[1], power = (real)scales[2];
  const real *cos = IN(L_TURNS), *sin = cos + half;
  EACH_ROW(i) for (int64_t k = 0; k < heads; k++) {
    const real *q = IN(L_Q) + i * s[L_Q_ROW] + k * n, *key = IN(L_K) + i * s[L_K_ROW] + k * n;
    const real *v = IN(L_V) + i * s[L_V_ROW] + k * P;
    real *g = p[L_G] ? OUT(L_G) + (i * heads + k) * n : NULL;
    real *h = OUT(L_H) + (i * heads + k) * n * P;
    if (g) EACH(j, m, n) store_some(g + j, exponential(-power * softplus(-load_some(g + j, m))), m);
    EACH(j, m, P) {
      vec value = load_some(v + j, m) * to, read = splat(0);
      for (int64_t c = 0; c < n; c++) {
        real kept = g ? g[c] : IN(L_KEPT)[k];
        vec now = load_some(h + c * P + j, m) * kept + value * key[c];
        store_some(h + c * P + j, now, m);
        read += now * q[c];
      }
      store_some(OUT(L_Y) + (i * heads + k) * P + j, read * by, m);
      if (p[L_TURNS]) for (int64_t c = 0; c < half; c++) {
        real *left = h + c * P + j, *right = left + half * P;
        vec x = load_some(left, m), y = load_some(right, m);
        store_some(left, x * cos[c] - y * sin[c], m);
        store_some(right, y * cos[c] + x * sin[c], m);
      }
    }
  }
}

// 1 - exp(x) for x <= 0: its series near 0, where the difference would lose its digits
INLINE vec one_less(vec x) {
  enum { TERMS = BITS == 32 ? 8 : 14 };
  vec sum = splat(1);
  for (int k = TERMS; k > 1; k--) sum = 1 + sum * x / (real)k;
  return choose((bits)(x > (real)-0.4), -x * sum, 1 - exponential(x));
}

// RG-LRU: log a = -leak sigmoid(W_r u), h = a h + sqrt(1 - a^2) sigmoid(W_i u) u, without the root
// where a document has not begun; weights (heads, in, out)
enum { G_U, G_IN, G_IN_BIAS, G_REC, G_REC_BIAS, G_LEAK, G_H, G_BEGUN };
enum { G_HEADS = 1, G_N };
void NAME(step_rglru)(void **p, const int64_t *s) {
  int64_t heads = s[G_HEADS], n = s[G_N], *begun = p[G_BEGUN];
  EACH_ROW(i) {
    for (int64_t k = 0; k < heads; k++) EACH(j, m, n) {
      int64_t at = k * n + j;
      const real *u = IN(G_U) + i * heads * n + k * n;
      vec in = load_some(IN(G_IN_BIAS) + at, m), rec = load_some(IN(G_REC_BIAS) + at, m);
      for (int64_t c = 0, w = k * n * n + j; c < n; c++, w += n) {
        in += u[c] * load_some(IN(G_IN) + w, m);
        rec += u[c] * load_some(IN(G_REC) + w, m);
      }
      vec log_a = -load_some(IN(G_LEAK) + at, m) * sigmoid(rec);
      vec written = sigmoid(in) * load_some(u + j, m), size = one_less(2 * log_a);
      if (begun[i]) for (int l = 0; l < LANES; l++) written[l] *= (real)sqrt((double)size[l]);
      real *h = OUT(G_H) + i * heads * n + at;
      store_some(h, exponential(log_a) * load_some(h, m) + written, m);
    }
    begun[i] = 1;
  }
}

// RWKV-7's streams and memory (b, heads, n, n), indexed [value, key]; bonus = (r k r_k) v of a head
enum { R_R, R_W, R_K, R_V, R_RATE, R_W0, R_A0, R_KK, R_KA, R_RK, R_S, R_STREAMS, R_Y, R_BONUS };
enum { R_HEADS = 1, R_N };
void NAME(step_wkv7)(void **p, const int64_t *s) {
  int64_t heads = s[R_HEADS], n = s[R_N];
  EACH_ROW(i) for (int64_t h = 0; h < heads; h++) {
    int64_t at = (i * heads + h) * n, c = h * n;
    const real *r = IN(R_R) + at, *k = IN(R_K) + at, *v = IN(R_V) + at;
    real *w = OUT(R_STREAMS) + 4 * at, *key = w + n, *a = key + n, *b = a + n, *S = OUT(R_S) + at * n;
    EACH(j, m, n) store_some(a + j, load_some(k + j, m) * load_some(IN(R_KK) + c + j, m), m);
    double length = sqrt((double)squares(a, n));
    real by = (real)(1 / (length > 1e-12 ? length : 1e-12));
    vec told = splat(0);
    EACH(j, m, n) {
      vec rate = sigmoid(load_some(IN(R_A0) + c + j, m) + load_some(IN(R_RATE) + at + j, m));
      vec fade = sigmoid(load_some(IN(R_W0) + c + j, m) + load_some(IN(R_W) + at + j, m));
      vec share = load_some(IN(R_KA) + c + j, m), removed = load_some(a + j, m) * by;
      vec written = load_some(k + j, m) * (1 - share + rate * share);
      store_some(w + j, exponential(fade * (real)-0.6065306597126334), m);
      store_some(key + j, written, m), store_some(a + j, -removed, m);
      store_some(b + j, removed * rate, m);
      told += load_some(r + j, m) * written * load_some(IN(R_RK) + c + j, m);
    }
    real bonus = total(told);
    EACH(j, m, n) store_some(OUT(R_BONUS) + at + j, load_some(v + j, m) * bonus, m);
    for (int64_t e = 0; e < n; e++, S += n) {
      vec sum = splat(0), read = splat(0);
      EACH(j, m, n) sum += load_some(S + j, m) * load_some(a + j, m);
      real answer = total(sum);
      EACH(j, m, n) {
        vec now = load_some(S + j, m) * load_some(w + j, m) + answer * load_some(b + j, m);
        now += v[e] * load_some(key + j, m);
        store_some(S + j, now, m);
        read += now * load_some(r + j, m);
      }
      OUT(R_Y)[at + e] = total(read);
    }
  }
}

// Mamba-3: keys and queries of a head, C and B with its biases, turned by angles that go on by
// pi tanh(turn) dt; h = exp(-max(rate(A), floor) dt) (h + (1 - share) dt v k of before) + share dt u
// key; y = h query + D u; h (b, heads, p, n)
enum { Z_U, Z_DT, Z_A, Z_SHARE, Z_TURN, Z_B, Z_C, Z_DT_BIAS, Z_B_BIAS, Z_C_BIAS, Z_D, Z_FLOOR,
       Z_ANGLE, Z_H, Z_K, Z_V, Z_QUERY, Z_Y };
enum { Z_HEADS = 1, Z_P, Z_GROUPS, Z_N, Z_S, Z_ROW, Z_HEAVY };
static const double PI = 3.14159265358979323846;

static void turned(real *to, const real *from, const real *bias, const double *cs, int64_t n, int64_t s) {
  EACH(j, m, n) store_some(to + j, load_some(from + j, m) + load_some(bias + j, m), m);
  for (int64_t c = 0; c < s; c++, to += 2) {
    double x = (double)to[0], y = (double)to[1], cos = cs[2 * c], sin = cs[2 * c + 1];
    to[0] = (real)(x * cos - y * sin), to[1] = (real)(y * cos + x * sin);
  }
}

void NAME(step_trapezoid)(void **p, const int64_t *s) {
  int64_t heads = s[Z_HEADS], P = s[Z_P], n = s[Z_N], turns = s[Z_S], per = heads / s[Z_GROUPS];
  enum { MOST = 1024 };
  double cs[2 * MOST];
  EACH_ROW(i) for (int64_t k = 0; k < heads; k++) {
    int64_t at = i * s[Z_ROW] + k, head = i * heads + k, group = (i * s[Z_GROUPS] + k / per) * n;
    real steps[LANES], shares[LANES], rates[LANES], a = IN(Z_A)[at];
    store(steps, softplus(splat(IN(Z_DT)[at] + IN(Z_DT_BIAS)[k])));
    store(shares, sigmoid(splat(IN(Z_SHARE)[at])));
    if (s[Z_HEAVY]) rates[0] = a >= 0 ? 1 + a : 1 / (1 - a); else store(rates, softplus(splat(a)));
    real dt = steps[0], floor = (real)*(const double *)p[Z_FLOOR];
    vec decay = exponential(splat(-(rates[0] > floor ? rates[0] : floor) * dt));
    for (int64_t c = 0; c < turns; c++) {
      real *angle = OUT(Z_ANGLE) + head * turns + c;
      double now = (double)*angle + PI * tanh((double)IN(Z_TURN)[i * s[Z_ROW] + c]) * (double)dt;
      now = fmod(now, 2 * PI), now = now < 0 ? now + 2 * PI : now;
      *angle = (real)now, cs[2 * c] = cos(now), cs[2 * c + 1] = sin(now);
    }
    real *key = OUT(Z_QUERY) + 2 * head * n, *query = key + n, *before = OUT(Z_K) + head * n;
    real *values = OUT(Z_V) + head * P, *h = OUT(Z_H) + head * P * n, *y = OUT(Z_Y) + head * P;
    const real *u = IN(Z_U) + i * s[Z_ROW] + k * P;
    turned(key, IN(Z_B) + group, IN(Z_B_BIAS) + k * n, cs, n, turns);
    turned(query, IN(Z_C) + group, IN(Z_C_BIAS) + k * n, cs, n, turns);
    for (int64_t e = 0; e < P; e++, h += n) {
      real left = (1 - shares[0]) * dt * values[e], right = shares[0] * dt * u[e];
      vec sum = splat(0);
      EACH(j, m, n) {
        vec v = decay * (load_some(h + j, m) + left * load_some(before + j, m));
        v += right * load_some(key + j, m);
        store_some(h + j, v, m);
        sum += v * load_some(query + j, m);
      }
      y[e] = total(sum) + IN(Z_D)[k] * u[e], values[e] = u[e];
    }
    memcpy(before, key, (size_t)n * sizeof(real));
  }
}
