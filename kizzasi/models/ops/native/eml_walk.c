// eml-core's coordinate descent on flattened attention, one trial after another.
//
// A trial adds a step to one parameter and keeps it if the error falls. What it leaves as it is is
// not computed again: a parameter of q, k or v moves one head, hence some of the context, hence all
// outputs; one of the output tree moves one output. A trial is given up where its squares, summed
// in one order, already exceed what it must fall below: the decision is the same.
//
//   S, P      samples, and how many a row holds: a multiple of 2 vectors, masked beyond S
//   n, r      positions, channels of each; C = n r
//   M, O      inputs and outputs of all positions together
//   z, u      a head or output before and after its chain of EML operators; rows of samples
#include "eml.h"

enum { PARAMS, INPUTS, TARGETS, INDEX, DELTA, RESULT, ROOM };
enum { N_S, N_P, N_N, N_R, N_M, N_O, N_DEPTH, N_UNUSED, N_TRIALS };
enum { BEFORE, BEST, ACCEPTS, MARGIN };  // in RESULT, mean squares; MARGIN is given
enum { ROWS = 4, MOST = 8, REFRESH = 512 };  // MOST positions; trials between recomputations

typedef struct { real *w, *b, *chain; } tree;
typedef struct {
  int64_t S, P, n, r, M, C, O, depth;
  real scale;
  tree heads[3], out;
  const real *inputs, *targets;
  real *zh, *u, *context, *context1, *z, *z1, *square, *square1, *mask, *row, *moved;
} walk;

INLINE real *take(real **from, int64_t count) {
  real *p = *from;
  *from += (count + 15) / 16 * 16;
  return p;
}

// Where everything is; returns how many numbers of room that takes.
static int64_t lay_out(walk *a, void **p, const int64_t *s) {
  a->S = s[N_S], a->P = s[N_P], a->n = s[N_N], a->r = s[N_R], a->M = s[N_M], a->O = s[N_O];
  a->C = a->n * a->r, a->depth = s[N_DEPTH], a->scale = 1 / (real)sqrt((double)a->r);
  real *q = p[PARAMS], *room = p[ROOM], *start = room;
  for (int64_t t = 0; t < 3; t++) {
    a->heads[t] = (tree){q, q + a->C * a->M, q + a->C * (a->M + 1)};
    q += a->C * (a->M + 1 + 3 * a->depth);
  }
  q += s[N_UNUSED];
  a->out = (tree){q, q + a->O * a->C, q + a->O * (a->C + 1)};
  a->inputs = p[INPUTS], a->targets = p[TARGETS];
  a->zh = take(&room, 3 * a->C * a->P), a->u = take(&room, 3 * a->C * a->P);
  a->context = take(&room, a->C * a->P), a->context1 = take(&room, a->C * a->P);
  a->z = take(&room, a->O * a->P), a->z1 = take(&room, a->O * a->P);
  a->square = take(&room, a->O), a->square1 = take(&room, a->O);
  a->mask = take(&room, a->P), a->row = take(&room, 2 * a->P);
  a->moved = take(&room, a->C * a->P);
  return room - start;
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE void run_chain(vec v[ROWS][2], const real *const chain[ROWS], int64_t depth) {
  for (int64_t level = 0; level < depth; level++)
    for (int j = 0; j < ROWS; j++) {
      const real *c = chain[j] + 3 * level;
      for (int i = 0; i < 2; i++) v[j][i] = safe_node(v[j][i], splat(c[0]), splat(c[1]), splat(c[2]));
    }
}

// ROWS rows from `first` of z + W x, of two vectors of samples: x has `count` rows, W a column for
// each, `step` apart. Rows beyond the last are the last again.
INLINE void product(vec v[ROWS][2], const real *z, int64_t P, const real *w, int64_t width,
                    int64_t step, const real *x, int64_t count, int64_t first, int64_t last) {
  const real *line[ROWS];
  for (int j = 0; j < ROWS; j++) {
    int64_t row = least(first + j, last);
    line[j] = w + row * width;
    for (int i = 0; i < 2; i++) v[j][i] = load(z + row * P + i * WIDTH);
  }
  for (int64_t k = 0; k < count; k++) {
    vec a = load(x + k * P), b = load(x + k * P + WIDTH);
    for (int j = 0; j < ROWS; j++) {
      vec c = splat(line[j][k * step]);
      v[j][0] += c * a;
      v[j][1] += c * b;
    }
  }
}

// Sums of squares of the errors of an output, of two vectors of samples.
INLINE vec squares(const walk *a, vec y[2], int64_t row, int64_t at) {
  vec sum = splat(0);
  for (int i = 0; i < 2; i++) {
    vec error = y[i] - load(a->targets + row * a->P + at + i * WIDTH);
    error = (vec)((bits)error & (bits)load(a->mask + at + i * WIDTH));
    sum += error * error;
  }
  return sum;
}

INLINE int falls(const walk *a, real total, const double *result) {
  return (double)total / (double)(a->S * a->O) + result[MARGIN] < result[BEST];
}

// The outputs after z + W moved, into z1 and square1; the sum of squares, or NaN once it cannot
// fall below what `result` asks for (which may be NULL: then all is computed).
static real outputs(walk *a, const real *w, int64_t step, const real *moved, int64_t count,
                    const double *result) {
  real sum = 0;
  for (int64_t first = 0; first < a->O; first += ROWS) {
    const real *chain[ROWS];
    vec part[ROWS] = {0};
    for (int j = 0; j < ROWS; j++)
      chain[j] = a->out.chain + 3 * a->depth * least(first + j, a->O - 1);
    for (int64_t at = 0; at < a->P; at += 2 * WIDTH) {
      vec v[ROWS][2];
      product(v, a->z + at, a->P, w, a->C, step, moved + at, count, first, a->O - 1);
      for (int j = 0; j < ROWS && first + j < a->O; j++)
        for (int i = 0; i < 2; i++) store(a->z1 + (first + j) * a->P + at + i * WIDTH, v[j][i]);
      run_chain(v, chain, a->depth);
      for (int j = 0; j < ROWS; j++) part[j] += squares(a, v[j], least(first + j, a->O - 1), at);
    }
    for (int j = 0; j < ROWS && first + j < a->O; j++)
      sum += a->square1[first + j] = total(part[j]);
    if (result && !falls(a, sum, result)) return NAN;
  }
  return sum;
}

INLINE void swap(real **a, real **b) { real *c = *a; *a = *b; *b = c; }

static void keep_outputs(walk *a) {
  swap(&a->z, &a->z1);
  swap(&a->square, &a->square1);
}

// Contexts of queries first .. last - 1, from u into `to`.
static void attend(walk *a, int64_t first, int64_t last, real *to) {
  int64_t n = a->n, r = a->r, P = a->P;
  const real *q = a->u, *k = q + a->C * P, *v = k + a->C * P;
  for (int64_t i = first; i < last; i++)
    for (int64_t at = 0; at < P; at += WIDTH) {
      vec weight[MOST], most = splat(0), sum = splat(0);
      for (int64_t j = 0; j < n; j++) {
        vec score = splat(0);
        for (int64_t c = 0; c < r; c++)
          score += load(q + (i * r + c) * P + at) * load(k + (j * r + c) * P + at);
        weight[j] = score * a->scale;
        most = j ? MAX(most, weight[j]) : weight[j];
      }
      for (int64_t j = 0; j < n; j++) {
        weight[j] = bounded_exp(MAX(splat(BITS == 32 ? -80 : -700), weight[j] - most));
        sum += weight[j];
      }
      for (int64_t j = 0; j < n; j++) weight[j] /= sum;
      for (int64_t c = 0; c < r; c++) {
        vec mean = splat(0);
        for (int64_t j = 0; j < n; j++) mean += weight[j] * load(v + (j * r + c) * P + at);
        store(to + (i * r + c) * P + at, mean);
      }
    }
}

static void fill_bias(real *z, const real *b, int64_t rows, int64_t P) {
  for (int64_t row = 0; row < rows; row++)
    for (int64_t s = 0; s < P; s++) z[row * P + s] = b[row];
}

// Everything about the present point, afresh; the sum of squares.
static real refresh(walk *a) {
  int64_t P = a->P, C = a->C;
  for (int64_t t = 0; t < 3; t++) {
    tree *head = a->heads + t;
    real *z = a->zh + t * C * P, *u = a->u + t * C * P;
    fill_bias(z, head->b, C, P);
    for (int64_t first = 0; first < C; first += ROWS) {
      const real *chain[ROWS];
      for (int j = 0; j < ROWS; j++) chain[j] = head->chain + 3 * a->depth * least(first + j, C - 1);
      for (int64_t at = 0; at < P; at += 2 * WIDTH)
        for (int pass = 0; pass < 2; pass++) {
          vec v[ROWS][2];
          product(v, z + at, P, head->w, a->M, 1, a->inputs + at, pass ? 0 : a->M, first, C - 1);
          if (pass) run_chain(v, chain, a->depth);
          for (int j = 0; j < ROWS && first + j < C; j++)
            for (int i = 0; i < 2; i++)
              store((pass ? u : z) + (first + j) * P + at + i * WIDTH, v[j][i]);
        }
    }
  }
  attend(a, 0, a->n, a->context);
  fill_bias(a->z, a->out.b, a->O, P);
  real sum = outputs(a, a->out.w, 1, a->context, C, NULL);
  keep_outputs(a);
  return sum;
}

// z + step x of one row into `z1`, and its chain into `u1`; x is NULL where a chain was changed.
static void move_row(const walk *a, const real *z, real step, const real *x, int constant,
                     const real *chain, real *z1, real *u1) {
  for (int64_t at = 0; at < a->P; at += WIDTH) {
    vec v = load(z + at);
    if (x) v += step * load(x + at);
    if (constant) v += step;
    store(z1 + at, v);
    for (int64_t level = 0; level < a->depth; level++) {
      const real *c = chain + 3 * level;
      v = safe_node(v, splat(c[0]), splat(c[1]), splat(c[2]));
    }
    store(u1 + at, v);
  }
}

// What parameter `i` of a tree of `rows` rows and `width` columns belongs to: its row; its column
// (width for the bias, width + 1 for the chain) in *column.
INLINE int64_t locate(int64_t i, int64_t rows, int64_t width, int64_t depth, int64_t *column) {
  if (i < rows * width) return *column = i % width, i / width;
  i -= rows * width;
  if (i < rows) return *column = width, i;
  return *column = width + 1, (i - rows) / (3 * depth);
}

// A step on a parameter of q, k or v, which has been changed; the new sum if it is kept, or NaN.
static real try_head(walk *a, int64_t kind, int64_t i, real step, const double *result) {
  int64_t P = a->P, r = a->r, column, local = locate(i, a->C, a->M, a->depth, &column);
  int64_t position = local / r, channel = local % r, head = kind * a->C + local;
  const tree *t = a->heads + kind;
  real *u = a->u + head * P, *z = a->zh + head * P, *z1 = a->row, *before = a->row + P;
  size_t bytes = (size_t)P * sizeof(real);
  memcpy(before, u, bytes);
  move_row(a, z, step, column < a->M ? a->inputs + column * P : NULL, column == a->M,
           t->chain + 3 * a->depth * local, z1, u);
  // Rows of the context that move: those of one query, one channel of every query, or all.
  int64_t first = kind == 0 ? position * r : kind == 2 ? channel : 0, apart = kind == 2 ? r : 1;
  int64_t count = kind == 0 ? r : kind == 2 ? a->n : a->C;
  if (kind == 0) attend(a, position, position + 1, a->context1);
  else attend(a, 0, a->n, a->context1);
  for (int64_t k = 0; k < count; k++) {
    int64_t row = (first + k * apart) * P;
    for (int64_t s = 0; s < P; s++)
      a->moved[k * P + s] = a->context1[row + s] - a->context[row + s];
  }
  real sum = outputs(a, a->out.w + first, apart, a->moved, count, result);
  if (!(sum == sum)) {
    memcpy(u, before, bytes);
    return sum;
  }
  memcpy(z, z1, bytes);
  for (int64_t k = 0; k < count; k++) {
    int64_t row = (first + k * apart) * P;
    memcpy(a->context + row, a->context1 + row, bytes);
  }
  keep_outputs(a);
  return sum;
}

// The same on a parameter of the output tree.
static real try_out(walk *a, int64_t i, real step, const double *result) {
  int64_t P = a->P, column, row = locate(i, a->O, a->C, a->depth, &column);
  real *z1 = a->row, *y = a->row + P, sum = 0, square;
  move_row(a, a->z + row * P, step, column < a->C ? a->context + column * P : NULL, column == a->C,
           a->out.chain + 3 * a->depth * row, z1, y);
  vec part = splat(0);
  for (int64_t at = 0; at < P; at += 2 * WIDTH) {
    vec v[2] = {load(y + at), load(y + at + WIDTH)};
    part += squares(a, v, row, at);
  }
  square = total(part);
  for (int64_t o = 0; o < a->O; o++) sum += o == row ? square : a->square[o];
  if (!falls(a, sum, result)) return NAN;
  memcpy(a->z + row * P, z1, (size_t)P * sizeof(real));
  a->square[row] = square;
  return sum;
}

// How much room a walk needs, in numbers.
void NAME(eml_walk_room)(void **p, const int64_t *s) {
  walk a;
  void *nowhere[ROOM + 1] = {0};
  *(int64_t *)p[0] = lay_out(&a, nowhere, s);
}

// The error of the present point into RESULT, and then all trials.
void NAME(eml_walk)(void **p, const int64_t *s) {
  walk a;
  lay_out(&a, p, s);
  for (int64_t i = 0; i < a.P; i++) ((word *)a.mask)[i] = i < a.S ? ~(word)0 : 0;
  const int64_t *index = p[INDEX];
  const double *delta = p[DELTA];
  double *result = p[RESULT];
  int64_t of_tree = a.C * (a.M + 1 + 3 * a.depth);
  real *params = p[PARAMS];
  result[BEFORE] = (double)refresh(&a) / (double)(a.S * a.O);
  result[BEST] = result[BEFORE] < INFINITY ? result[BEFORE] : INFINITY;  // NaN is bad, and no end
  for (int64_t trial = 0; trial < s[N_TRIALS]; trial++) {
    if (trial && trial % REFRESH == 0) refresh(&a);
    int64_t i = index[trial], rest = i - 3 * of_tree - s[N_UNUSED];
    real saved = params[i], step = (real)delta[trial], sum = NAN;
    if (i >= 3 * of_tree && rest < 0) continue;  // a tree that is not in use
    params[i] = saved + step;
    if (rest >= 0) sum = try_out(&a, rest, step, result);
    else sum = try_head(&a, i / of_tree, i % of_tree, step, result);
    if (sum == sum) {
      result[BEST] = (double)sum / (double)(a.S * a.O);
      result[ACCEPTS] += 1;
    } else {
      params[i] = saved;
    }
  }
}
