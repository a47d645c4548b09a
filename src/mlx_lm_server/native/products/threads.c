/* Work is open while its caller works on it. A helper that comes in time takes blocks; the caller
 * waits for those who did, never for one that the system has not scheduled yet.
 */
#define _GNU_SOURCE
#include "threads.h"

#include <immintrin.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { MAX_THREADS = 64 };

static struct {
  pthread_mutex_t owner; /* one work at a time is shared out; a second caller works alone */
  int num_helpers;
  long spin_ns;
  void (*run)(void *work);
  void *work;
  atomic_int round, is_open, active, sleepers;
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER};

static long now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000L + t.tv_nsec;
}

static int next_round(int seen) {
  long until = now_ns() + pool.spin_ns;
  int round;
  while ((round = atomic_load(&pool.round)) == seen) {
    for (int i = 0; i < 64; i++) _mm_pause();
    if (now_ns() < until) continue;
    atomic_fetch_add(&pool.sleepers, 1);
    syscall(SYS_futex, &pool.round, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_fetch_sub(&pool.sleepers, 1);
  }
  return round;
}

static void *help(void *unused) {
  for (int seen = 0;;) {
    seen = next_round(seen);
    atomic_fetch_add(&pool.active, 1);
    if (atomic_load(&pool.is_open)) pool.run(pool.work);
    atomic_fetch_sub(&pool.active, 1);
  }
  return unused;
}

void share_out(void (*run)(void *work), void *work) {
  if (pool.num_helpers == 0 || pthread_mutex_trylock(&pool.owner) != 0) {
    run(work);
    return;
  }
  pool.run = run;
  pool.work = work;
  atomic_store(&pool.is_open, 1);
  atomic_fetch_add(&pool.round, 1);
  if (atomic_load(&pool.sleepers) > 0)
    syscall(SYS_futex, &pool.round, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
  run(work);
  atomic_store(&pool.is_open, 0);
  while (atomic_load(&pool.active) > 0) _mm_pause();
  pthread_mutex_unlock(&pool.owner);
}

int num_threads(void) { return pool.num_helpers + 1; }

void start_helpers(int num_threads, int spin_us) {
  pool.spin_ns = spin_us * 1000L;
  int wanted = (num_threads < MAX_THREADS ? num_threads : MAX_THREADS) - 1;
  for (int i = 0; i < wanted; i++) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, help, NULL) != 0) break;
    pthread_detach(thread);
    pool.num_helpers++;
  }
}

float *scratch(size_t num_floats) {
  static __thread float *memory;
  static __thread size_t capacity;
  if (num_floats > capacity) {
    free(memory);
    memory = aligned_alloc(64, (num_floats * sizeof(float) + 63) / 64 * 64);
    capacity = memory ? num_floats : 0;
  }
  return memory;
}
