#define _GNU_SOURCE
#include "touch.h"

#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* since Linux 5.14 */
#endif

/* While a piece is touched, nobody may change the process's map of its memory. */
enum { PIECE_BYTES = 256 * 1024, MOST_WAITING = 1024 };

typedef struct {
  uintptr_t start, end;
} range;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t is_work = PTHREAD_COND_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static range waiting[MOST_WAITING];
static unsigned num_put, num_taken;

/* Memory that was given back meanwhile is an error that says nothing, or gets pages for its next
 * owner. */
static void touch_range(range pages) {
  for (uintptr_t at = pages.start; at < pages.end; at += PIECE_BYTES) {
    size_t left = pages.end - at, size = left < PIECE_BYTES ? left : PIECE_BYTES;
    if (madvise((void *)at, size, MADV_POPULATE_WRITE)) return;
  }
}

static void *work(void *nothing) {
  struct sched_param none = {0};
  sched_setscheduler(0, SCHED_BATCH, &none); /* it takes no core from a thread that computes */
  for (;;) {
    pthread_mutex_lock(&lock);
    while (num_taken == num_put) pthread_cond_wait(&is_work, &lock);
    range next = waiting[num_taken++ % MOST_WAITING];
    pthread_mutex_unlock(&lock);
    touch_range(next);
  }
  return nothing;
}

static void start(void) {
  pthread_t thread;
  if (pthread_create(&thread, NULL, work, NULL) == 0) pthread_detach(thread);
}

void touch(void *memory, size_t size) {
  const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = (uintptr_t)memory;
  const range whole = {(first + page - 1) / page * page, (first + size) / page * page};
  if (whole.start >= whole.end) return;
  pthread_once(&once, start);
  pthread_mutex_lock(&lock);
  if (num_put - num_taken < MOST_WAITING) waiting[num_put++ % MOST_WAITING] = whole;
  pthread_cond_signal(&is_work);
  pthread_mutex_unlock(&lock);
}
