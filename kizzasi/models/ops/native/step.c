// One token through any number of layers, in one call: a program of instructions that is written
// once and run for every token. steps.py writes it; see there for what each instruction computes.
//
//   code  how many instructions, then of each: which, how many pointers, how many sizes, the sizes
//   p     the pointers of all, one after another
//
// b vectors are worked on at once, `x_row` numbers apart; b is the first size of every instruction.
#include "step.h"

// y = W x + bias
enum { P_X, P_W, P_BIAS, P_Y };
enum { P_OUT = 1, P_IN, P_W_ROW, P_X_ROW, P_Y_ROW, P_THREADS };
enum { OUTPUTS = 64 };
static void product_item(void **p, const int64_t *s, int64_t item) {
  int64_t first = item * OUTPUTS, last = first + OUTPUTS < s[P_OUT] ? first + OUTPUTS : s[P_OUT];
  product q = {IN(P_W), IN(P_BIAS), IN(P_X), OUT(P_Y), s[P_W_ROW], s[P_X_ROW], s[P_Y_ROW], s[P_IN]};
  multiply(q, s[N_B], first, last);
}
static void run_product(void **p, const int64_t *s) {
  kizzasi_share(product_item, p, s, (s[P_OUT] + OUTPUTS - 1) / OUTPUTS, s[P_THREADS]);
}

// y = (w + plus) (x - mean) / sqrt(var + eps) + bias, or without the mean; of `groups` in a row,
// whose weights are the same ones or the next ones
enum { N_X, N_W, N_BIAS, N_EPS, N_Y };
enum { N_D = 1, N_GROUPS, N_W_GROUP, N_X_ROW, N_Y_ROW, N_MEAN, N_PLUS };
static void run_norm(void **p, const int64_t *s) {
  int64_t d = s[N_D];
  EACH_ROW(i) for (int64_t g = 0; g < s[N_GROUPS]; g++) {
    const real *x = IN(N_X) + i * s[N_X_ROW] + g * d;
    const real *w = p[N_W] ? IN(N_W) + g * s[N_W_GROUP] : NULL, *bias = p[N_BIAS] ? IN(N_BIAS) + g * s[N_W_GROUP] : NULL;
    real *y = OUT(N_Y) + i * s[N_Y_ROW] + g * d, mean = 0;
    vec sum = splat(0);
    if (s[N_MEAN]) {
      EACH(j, m, d) sum += load_some(x + j, m);
      mean = total(sum) / (real)d, sum = splat(0);
    }
    EACH(j, m, d) {
      vec v = load_some(x + j, m) - mean;
      if (m < WIDTH) {  // what is beyond the end is not the mean away from it
        real rest[LANES] = {0};
        store_some(rest, v, m), v = load(rest);
      }
      sum += v * v;
    }
    real r = (real)(1 / sqrt((double)total(sum) / (double)d + *(const double *)p[N_EPS]));
    EACH(j, m, d) {
      vec v = (load_some(x + j, m) - mean) * r;
      if (w) v *= load_some(w + j, m) + (real)s[N_PLUS];
      store_some(y + j, bias ? v + load_some(bias + j, m) : v, m);
    }
  }
}

// y = activation(a) c; c may be left out
enum { G_A, G_C, G_Y };
enum { G_D = 1, G_KIND, G_A_ROW, G_C_ROW, G_Y_ROW };
static void run_gate(void **p, const int64_t *s) {
  EACH_ROW(i) EACH(j, m, s[G_D]) {
    vec v = activated(s[G_KIND], load_some(IN(G_A) + i * s[G_A_ROW] + j, m));
    if (p[G_C]) v *= load_some(IN(G_C) + i * s[G_C_ROW] + j, m);
    store_some(OUT(G_Y) + i * s[G_Y_ROW] + j, v, m);
  }
}

// x = stream x + by y
enum { A_X, A_Y, A_SCALES };
enum { A_D = 1 };
static void run_add(void **p, const int64_t *s) {
  const double *by = p[A_SCALES];
  int64_t n = s[N_B] * s[A_D];
  EACH(j, m, n) {
    vec v = (real)by[0] * load_some(IN(A_X) + j, m) + (real)by[1] * load_some(IN(A_Y) + j, m);
    store_some(OUT(A_X) + j, v, m);
  }
}

// y = conv(x), or silu of it, over the last k inputs, which lie one behind the other on a tape (k, b, c)
enum { C_X, C_TAPS, C_BIAS, C_TAPE, C_Y };
enum { C_C = 1, C_K, C_X_ROW, C_SILU };
static void run_conv(void **p, const int64_t *s) {
  int64_t c = s[C_C], k = s[C_K], step = s[N_B] * c;
  EACH_ROW(i) EACH(j, m, c) {
    real *tape = OUT(C_TAPE) + i * c + j;
    const real *taps = IN(C_TAPS) + j;
    vec y = p[C_BIAS] ? load_some(IN(C_BIAS) + j, m) : splat(0), now;
    for (int64_t l = 0; l < k; l++, tape += step, taps += c) {
      now = load_some(l + 1 < k ? tape + step : IN(C_X) + i * s[C_X_ROW] + j, m);
      store_some(tape, now, m);
      y += now * load_some(taps, m);
    }
    store_some(OUT(C_Y) + i * c + j, s[C_SILU] ? y * sigmoid(y) : y, m);
  }
}

// Mamba: dt = softplus(dt), h = exp(dt A) h + dt u B, y = (h C + D u) silu(z); h (b, i, n)
enum { S_U, S_DT, S_A, S_B, S_C, S_D, S_Z, S_H, S_Y };
enum { S_I = 1, S_N, S_BC_ROW, S_Z_ROW };
static void run_scan(void **p, const int64_t *s) {
  int64_t d = s[S_I], n = s[S_N];
  EACH_ROW(i) {
    const real *u = IN(S_U) + i * d, *B = IN(S_B) + i * s[S_BC_ROW], *C = IN(S_C) + i * s[S_BC_ROW];
    const real *A = IN(S_A), *z = IN(S_Z) + i * s[S_Z_ROW];
    real *dt = OUT(S_DT) + i * d, *h = OUT(S_H) + i * d * n, *y = OUT(S_Y) + i * d;
    EACH(j, m, d) store_some(dt + j, softplus(load_some(dt + j, m)), m);
    for (int64_t c = 0; c < d; c++, A += n, h += n) {
      real by = dt[c], w = by * u[c];
      vec sum = splat(0);
      EACH(j, m, n) {
        vec v = exponential(load_some(A + j, m) * by) * load_some(h + j, m);
        v += w * load_some(B + j, m);
        store_some(h + j, v, m);
        sum += v * load_some(C + j, m);
      }
      y[c] = total(sum);
    }
    EACH(j, m, d) {
      vec g = load_some(z + j, m), v = load_some(u + j, m) * load_some(IN(S_D) + j, m);
      store_some(y + j, (load_some(y + j, m) + v) * g * sigmoid(g), m);
    }
  }
}

// y[k] = start + (end - start) share[k], of x and the token before it; last = x
enum { M_X, M_LAST, M_SHARES, M_Y };
enum { M_D = 1, M_K, M_FROM_BEFORE };
static void run_mix(void **p, const int64_t *s) {
  int64_t d = s[M_D], n = s[N_B] * d;
  EACH_ROW(i) EACH(j, m, d) {
    int64_t at = i * d + j;
    vec x = load_some(IN(M_X) + at, m), before = load_some(IN(M_LAST) + at, m);
    vec start = s[M_FROM_BEFORE] ? before : x, end = s[M_FROM_BEFORE] ? x : before;
    for (int64_t k = 0; k < s[M_K]; k++)
      store_some(OUT(M_Y) + k * n + at, start + (end - start) * load_some(IN(M_SHARES) + k * d + j, m), m);
    store_some(OUT(M_LAST) + at, x, m);
  }
}

// RWKV-4's sums (2, b, d), in units of exp(top); y = sigmoid(r) times the average
enum { W_K, W_V, W_R, W_DECAY, W_BONUS, W_SUMS, W_TOP, W_Y };
enum { W_D = 1 };
static void run_wkv4(void **p, const int64_t *s) {
  int64_t d = s[W_D], n = s[N_B] * d;
  EACH_ROW(i) EACH(j, m, d) {
    int64_t at = i * d + j;
    vec k = load_some(IN(W_K) + at, m), v = load_some(IN(W_V) + at, m);
    vec top = load_some(IN(W_TOP) + at, m), bonus = k + load_some(IN(W_BONUS) + j, m);
    vec num = load_some(IN(W_SUMS) + at, m), den = load_some(IN(W_SUMS) + n + at, m);
    vec unit = choose((bits)(top > bonus), top, bonus);
    vec past = exponential(top - unit), now = exponential(bonus - unit);
    vec y = (past * num + now * v) / (past * den + now);
    store_some(OUT(W_Y) + at, y * sigmoid(load_some(IN(W_R) + at, m)), m);
    top += load_some(IN(W_DECAY) + j, m);
    unit = choose((bits)(top > k), top, k);
    past = exponential(top - unit), now = exponential(k - unit);
    store_some(OUT(W_SUMS) + at, past * num + now * v, m);
    store_some(OUT(W_SUMS) + n + at, past * den + now, m);
    store_some(OUT(W_TOP) + at, unit, m);
  }
}

// y[j] = x[index[j]]
enum { I_X, I_INDEX, I_Y };
enum { I_D = 1, I_X_ROW, I_Y_ROW };
static void run_pick(void **p, const int64_t *s) {
  const int64_t *index = p[I_INDEX];
  EACH_ROW(i) for (int64_t j = 0; j < s[I_D]; j++)
    OUT(I_Y)[i * s[I_Y_ROW] + j] = IN(I_X)[i * s[I_X_ROW] + index[j]];
}

// The top_k of the experts (gates and ups (e, 2 h, d), downs (e, d, h)), by softmax of the logits
enum { E_X, E_LOGITS, E_UP, E_DOWN, E_SCALE, E_HIDDEN, E_Y };
enum { E_D = 1, E_N, E_H, E_K, E_SHARED_OUT };
static void run_experts(void **p, const int64_t *s) {
  int64_t d = s[E_D], n = s[E_N], h = s[E_H];
  real *hidden = OUT(E_HIDDEN), *part = hidden + 2 * h;  // 2 h + d numbers
  EACH_ROW(i) {
    real *score = OUT(E_LOGITS) + i * n, *y = OUT(E_Y) + i * d, most = score[0];
    double whole = 0, chosen = 0;
    for (int64_t e = 1; e < n; e++) most = score[e] > most ? score[e] : most;
    for (int64_t e = 0; e < n; e++) {
      real x[LANES];
      store(x, exponential(splat(score[e] - most)));
      whole += (double)x[0], score[e] = x[0];
    }
    int64_t best[64];
    double share[64];
    for (int64_t k = 0; k < s[E_K]; k++) {
      best[k] = 0;
      for (int64_t e = 1; e < n; e++) best[k] = score[e] > score[best[k]] ? e : best[k];
      share[k] = (double)score[best[k]] / whole, chosen += share[k], score[best[k]] = -1;
    }
    memset(y, 0, (size_t)d * sizeof(real));
    for (int64_t k = 0; k < s[E_K]; k++) {
      product up = {IN(E_UP) + best[k] * 2 * h * d, NULL, IN(E_X) + i * d, hidden, d, 0, 0, d};
      product down = {IN(E_DOWN) + best[k] * d * h, NULL, hidden, part, h, 0, 0, h};
      real by = (real)(share[k] / (s[E_SHARED_OUT] ? chosen + 1e-20 : 1) * *(const double *)p[E_SCALE]);
      multiply(up, 1, 0, 2 * h);
      EACH(j, m, h) {
        vec g = load_some(hidden + j, m);
        store_some(hidden + j, g * sigmoid(g) * load_some(hidden + h + j, m), m);
      }
      multiply(down, 1, 0, d);
      EACH(j, m, d) store_some(y + j, load_some(y + j, m) + by * load_some(part + j, m), m);
    }
  }
}

void NAME(attend_step)(void **p, const int64_t *s);  // attend.c
void NAME(packed)(void **p, const int64_t *s);       // packed.c
// memory_step.c:
void NAME(step_ssd)(void **p, const int64_t *s);
void NAME(step_delta)(void **p, const int64_t *s);
void NAME(step_linear)(void **p, const int64_t *s);
void NAME(step_rglru)(void **p, const int64_t *s);
void NAME(step_wkv7)(void **p, const int64_t *s);
void NAME(step_trapezoid)(void **p, const int64_t *s);

typedef void (*instruction)(void **p, const int64_t *s);
static const instruction INSTRUCTIONS[] = {  // in the order of steps.py
    run_product, run_norm, run_gate, run_add, run_conv, run_scan,
    NAME(step_ssd), run_mix, run_wkv4, run_experts, NAME(attend_step),
    NAME(packed), run_pick, NAME(step_delta), NAME(step_wkv7), NAME(step_linear), NAME(step_rglru),
    NAME(step_trapezoid),
};
void NAME(steps)(void **p, const int64_t *code) {
  const int64_t *s = code + 1;
  for (int64_t i = 0; i < code[0]; i++, p += s[1], s += 3 + s[2]) INSTRUCTIONS[s[0]](p, s + 3);
}
