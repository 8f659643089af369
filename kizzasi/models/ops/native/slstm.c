// The cells of ops/slstm.py, forward and backward.
//
// An item is one head and ROWS rows of the batch, which share every number of the head's R that is
// read. Gates and cells of the rows lie in buffers of rows of np numbers, padded with zeros.
#include "common.h"

enum { ROWS = 4 };
enum { Z, I, F, O, GATES };
enum { X, R, Y0, C0, N0, M0, STARTS, Y, C, N, M };                                // forward
enum { DY = M + 1, DC, DN, DM, PRODUCTS, DX, DY0, DC0, DN0, DM0 };                // backward
enum { N_B, N_T, N_H, N_N, KEPT, THREADS };  // KEPT: tokens whose cells are kept: all, or the last

typedef struct {
  int64_t h, i, rows, t, n, np, heads, kept;
  const uint8_t *starts;
} place;

static place find(void **p, const int64_t *s, int64_t item) {
  place w = {.h = item % s[N_H], .i = item / s[N_H] * ROWS, .t = s[N_T], .n = s[N_N]};
  w.rows = s[N_B] - w.i < ROWS ? s[N_B] - w.i : ROWS;
  w.np = (w.n + WIDTH - 1) / WIDTH * WIDTH, w.heads = s[N_H], w.kept = s[KEPT];
  w.starts = p[STARTS];
  return w;
}
INLINE int starts(const place *w, int64_t r, int64_t t) {
  return w->starts && w->starts[(w->i + r) * w->t + t];
}
// Where the n numbers of a row of the batch begin: in (b, h, n), (b, t, h, n), (b, t, 4, h, n).
INLINE int64_t at_end(const place *w, int64_t r) { return ((w->i + r) * w->heads + w->h) * w->n; }
INLINE int64_t at(const place *w, int64_t r, int64_t t, int64_t all) {
  return (((w->i + r) * all + (all == w->t ? t : 0)) * w->heads + w->h) * w->n;
}
INLINE int64_t at_gate(const place *w, int64_t r, int64_t t, int64_t g) {
  return ((((w->i + r) * w->t + t) * GATES + g) * w->heads + w->h) * w->n;
}
static void take(real *to, const real *from, const place *w) {
  memcpy(to, from, (size_t)w->n * sizeof(real));
  for (int64_t j = w->n; j < w->np; j++) to[j] = 0;
}
static void give(real *to, const real *from, const place *w) {
  memcpy(to, from, (size_t)w->n * sizeof(real));
}
static void take_ends(real *to, const real *from, const place *w) {
  memset(to, 0, (size_t)(ROWS * w->np) * sizeof(real));
  for (int64_t r = 0; r < w->rows; r++) take(to + r * w->np, from + at_end(w, r), w);
}
static void give_ends(real *to, const real *from, const place *w) {
  for (int64_t r = 0; r < w->rows; r++) give(to + at_end(w, r), from + r * w->np, w);
}
// The matrices of the head, (4, n, np): from y to the gates, or turned, from the gates to y.
static void take_matrices(real *to, const real *from, const place *w, int turned) {
  for (int64_t g = 0; g < GATES; g++)
    for (int64_t j = 0; j < w->n; j++) {
      const real *head = from + (g * w->heads + w->h) * w->n * w->n;
      real *row = to + (g * w->n + j) * w->np;
      take(row, head + j * w->n, w);
      if (turned) for (int64_t k = 0; k < w->n; k++) row[k] = head[k * w->n + j];
    }
}

// to (ROWS, np) += from (ROWS, np) matrix (n, np), for the V vectors that begin at `to`.
INLINE void add_vectors(const int V, real *to, const real *from, const real *matrix, int64_t n,
                        int64_t np) {
  vec sum[ROWS][2];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < V; v++) sum[r][v] = load(to + r * np + v * WIDTH);
  for (int64_t j = 0; j < n; j++, matrix += np) {
    vec row[2];
    for (int v = 0; v < V; v++) row[v] = load(matrix + v * WIDTH);
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < V; v++) sum[r][v] += row[v] * from[r * np + j];
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < V; v++) store(to + r * np + v * WIDTH, sum[r][v]);
}
static void add_product(real *to, const real *from, const real *matrix, int64_t n, int64_t np) {
  int64_t j = 0;
  for (; j + 2 * WIDTH <= np; j += 2 * WIDTH) add_vectors(2, to + j, from, matrix + j, n, np);
  if (j < np) add_vectors(1, to + j, from, matrix + j, n, np);
}

// How a cell goes on: what it keeps and writes, and the unit of both. faded: log of what it keeps.
typedef struct { vec faded, m, keep, write; bits empty; } change;
INLINE change move(vec i, vec f, vec n, vec m) {
  change to = {.faded = m - softplus(-f), .empty = (bits)(n == 0)};
  bits larger = (bits)(to.faded > i) | (bits)(to.faded != to.faded);
  to.m = choose(to.empty, i, choose(larger, to.faded, i));
  to.keep = choose(to.empty, splat(0), exponential(to.faded - to.m));
  to.write = exponential(i - to.m);
  return to;
}
INLINE vec hyperbolic_tangent(vec x) { return 2 * sigmoid(2 * x) - 1; }

static void forward_item(void **p, const int64_t *s, int64_t item) {
  place w = find(p, s, item);
  int64_t np = w.np, per = ROWS * np;
  real *space = room(GATES * w.n * np + (GATES + 4) * per), *matrix = space;
  real *gates = space + GATES * w.n * np, *y = gates + GATES * per, *c = y + per, *n = c + per;
  real *m = n + per;
  take_matrices(matrix, p[R], &w, 0);
  take_ends(y, p[Y0], &w), take_ends(c, p[C0], &w), take_ends(n, p[N0], &w), take_ends(m, p[M0], &w);
  memset(gates, 0, (size_t)(GATES * per) * sizeof(real));
  for (int64_t t = 0; t < w.t; t++) {
    for (int64_t r = 0; r < w.rows; r++) {
      for (int64_t g = 0; g < GATES; g++)
        take(gates + (g * ROWS + r) * np, (const real *)p[X] + at_gate(&w, r, t, g), &w);
      if (starts(&w, r, t))
        for (real *x = y; x <= m; x += per) memset(x + r * np, 0, (size_t)np * sizeof(real));
    }
    for (int64_t g = 0; g < GATES; g++)
      add_product(gates + g * per, y, matrix + g * w.n * np, w.n, np);
    for (int64_t j = 0; j < w.rows * np; j += WIDTH) {
      change to = move(load(gates + I * per + j), load(gates + F * per + j), load(n + j), load(m + j));
      vec cell = to.keep * load(c + j) + to.write * hyperbolic_tangent(load(gates + j));
      vec norm = to.keep * load(n + j) + to.write;
      store(c + j, cell), store(n + j, norm), store(m + j, to.m);
      store(y + j, sigmoid(load(gates + O * per + j)) * cell / norm);
    }
    for (int64_t r = 0; r < w.rows; r++) {
      int64_t kept = at(&w, r, t, w.kept);
      give((real *)p[Y] + at(&w, r, t, w.t), y + r * np, &w);
      give((real *)p[C] + kept, c + r * np, &w), give((real *)p[N] + kept, n + r * np, &w);
      give((real *)p[M] + kept, m + r * np, &w);
    }
  }
  free(space);
}

// The cells before a token of a row.
static void take_before(real *c, real *n, real *m, void **p, const place *w, int64_t r, int64_t t) {
  if (starts(w, r, t)) {
    memset(c, 0, (size_t)w->np * sizeof(real)), memset(n, 0, (size_t)w->np * sizeof(real));
    memset(m, 0, (size_t)w->np * sizeof(real));
  } else {
    int64_t from = t ? at(w, r, t - 1, w->t) : at_end(w, r);
    take(c, (const real *)p[t ? C : C0] + from, w), take(n, (const real *)p[t ? N : N0] + from, w);
    take(m, (const real *)p[t ? M : M0] + from, w);
  }
}

// One vector of cells, backward: gates become their gradients; dy, dc, dn, dm those before the token.
INLINE void cell_back(real *gates, int64_t per, vec dy, real *dc_, real *dn_, real *dm_, vec c, vec n,
                      vec m) {
  vec z = hyperbolic_tangent(load(gates)), i = load(gates + I * per), f = load(gates + F * per);
  vec open = sigmoid(load(gates + O * per));
  change to = move(i, f, n, m);
  vec cell = to.keep * c + to.write * z, norm = to.keep * n + to.write, read = dy / norm;
  vec dc = load(dc_) + read * open, dn = load(dn_) - read * open * cell / norm;
  vec kept = choose(to.empty, splat(0), (dc * c + dn * n) * to.keep);
  vec written = (dc * z + dn) * to.write, dm = load(dm_) - kept - written;
  bits tie = (bits)(to.faded == i) & ~to.empty, above = (bits)(to.faded > i) & ~to.empty;
  vec share = choose(tie, splat((real)0.5), choose(above, splat(1), splat(0)));
  vec dfaded = kept + share * dm;
  store(gates, dc * to.write * (1 - z * z));
  store(gates + I * per, written + (1 - share) * dm);
  store(gates + F * per, dfaded * sigmoid(-f));
  store(gates + O * per, read * cell * open * (1 - open));
  store(dc_, dc * to.keep), store(dn_, dn * to.keep), store(dm_, dfaded);
}

static void backward_item(void **p, const int64_t *s, int64_t item) {
  place w = find(p, s, item);
  int64_t np = w.np, per = ROWS * np;
  real *space = room(GATES * w.n * np + (GATES + 7) * per), *matrix = space;
  real *gates = space + GATES * w.n * np, *dy = gates + GATES * per, *dc = dy + per, *dn = dc + per;
  real *dm = dn + per, *c = dm + per, *n = c + per, *m = n + per;
  take_matrices(matrix, p[R], &w, 1);
  memset(gates, 0, (size_t)((GATES + 7) * per) * sizeof(real));
  take_ends(dc, p[DC], &w), take_ends(dn, p[DN], &w), take_ends(dm, p[DM], &w);
  for (int64_t t = w.t - 1; t >= 0; t--) {
    for (int64_t r = 0; r < w.rows; r++) {
      const real *seen = (const real *)p[PRODUCTS] +
                         ((w.h * s[N_B] + w.i + r) * w.t + t) * GATES * w.n;
      for (int64_t g = 0; g < GATES; g++) {
        real *gate = gates + (g * ROWS + r) * np;
        take(gate, (const real *)p[X] + at_gate(&w, r, t, g), &w);
        for (int64_t j = 0; j < w.n; j++) gate[j] += seen[g * w.n + j];
      }
      take_before(c + r * np, n + r * np, m + r * np, p, &w, r, t);
      const real *outer = (const real *)p[DY] + at(&w, r, t, w.t);
      for (int64_t j = 0; j < np; j += WIDTH) {
        vec more = load_some(outer + j, w.n - j < WIDTH ? w.n - j : WIDTH);
        int64_t k = r * np + j;
        cell_back(gates + k, per, load(dy + k) + more, dc + k, dn + k, dm + k, load(c + k),
                  load(n + k), load(m + k));
      }
      for (int64_t g = 0; g < GATES; g++) {
        real *gate = gates + (g * ROWS + r) * np;
        give((real *)p[DX] + at_gate(&w, r, t, g), gate, &w);
        for (int64_t j = w.n; j < np; j++) gate[j] = 0;
      }
    }
    memset(dy, 0, (size_t)per * sizeof(real));
    for (int64_t g = 0; g < GATES; g++)
      add_product(dy, gates + g * per, matrix + g * w.n * np, w.n, np);
    for (int64_t r = 0; r < w.rows; r++)
      if (starts(&w, r, t))
        for (real *x = dy; x <= dm; x += per) memset(x + r * np, 0, (size_t)np * sizeof(real));
  }
  give_ends(p[DY0], dy, &w), give_ends(p[DC0], dc, &w);
  give_ends(p[DN0], dn, &w), give_ends(p[DM0], dm, &w);
  free(space);
}

static int64_t items(const int64_t *s) { return (s[N_B] + ROWS - 1) / ROWS * s[N_H]; }
void NAME(slstm_forward)(void **p, const int64_t *s) {
  kizzasi_share(forward_item, p, s, items(s), s[THREADS]);
}
void NAME(slstm_backward)(void **p, const int64_t *s) {
  kizzasi_share(backward_item, p, s, items(s), s[THREADS]);
}
