// Items of work, shared among threads that are made for the call and wait for nothing but its end.
// A thread costs some 15 us, which callers weigh; nothing spins, nothing survives a fork, and a
// thread that gets no core leaves its items to the others.
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

typedef void (*work)(void **p, const int64_t *s, int64_t item);
typedef struct {
  work f;
  void **p;
  const int64_t *s;
  int64_t items, next;
} job;

static void *serve(void *given) {
  job *j = given;
  for (;;) {
    int64_t item = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED);
    if (item >= j->items) return NULL;
    j->f(j->p, j->s, item);
  }
}

enum { MOST = 256 };

void kizzasi_share(work f, void **p, const int64_t *s, int64_t items, int64_t threads) {
  job j = {f, p, s, items, 0};
  pthread_t others[MOST];
  int64_t wanted = (threads < items ? threads : items) - 1, made = 0;
  for (; made < wanted && made < MOST; made++)
    if (pthread_create(&others[made], NULL, serve, &j)) break;
  serve(&j);
  for (int64_t i = 0; i < made; i++) pthread_join(others[i], NULL);
}

// Whether this processor has an instruction set: 0 scalar, 1 avx2, 2 avx512, 3 neon.
int kizzasi_supports(int isa) {
  if (isa == 0) return 1;
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  if (isa == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == 2)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#elif defined(__aarch64__)
  if (isa == 3) return 1;
#endif
  return 0;
}

// Whether Intel made this processor; 1 for other kinds of machine, where nobody asks.
int kizzasi_of_intel(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel") != 0;
#else
  return 1;
#endif
}
