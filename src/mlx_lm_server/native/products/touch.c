#define _GNU_SOURCE
#include "touch.h"

#include <malloc.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__GLIBC__) && __GLIBC_PREREQ(2, 33)

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* since Linux 5.14; before, nothing happens */
#endif

/* While a piece is touched, nobody may change the process's map of its memory; and who waits to do so
 * gets a turn only if there is a pause. */
enum { PIECE_BYTES = 64 * 1024, PAUSE_US = 20 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t is_work = PTHREAD_COND_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static uintptr_t touched, end; /* of the heap: up to where its pages were looked for, and are to be */

/* What lies there stays. Memory that was given back meanwhile is an error that says nothing. */
static void *work(void *nothing) {
  const struct sched_param none = {0};
  sched_setscheduler(0, SCHED_IDLE, &none); /* it takes no core from a thread that computes */
  pthread_mutex_lock(&lock);
  for (;;) {
    while (touched >= end) pthread_cond_wait(&is_work, &lock);
    const uintptr_t at = touched;
    const size_t left = end - at, size = left < PIECE_BYTES ? left : PIECE_BYTES;
    touched += size;
    pthread_mutex_unlock(&lock);
    madvise((void *)at, size, MADV_POPULATE_WRITE);
    usleep(PAUSE_US);
    pthread_mutex_lock(&lock);
  }
  return nothing;
}

static void start(void) {
  pthread_t thread;
  touched = (uintptr_t)sbrk(0);
  if (pthread_create(&thread, NULL, work, NULL) == 0) pthread_detach(thread);
}

void grow_heap_ahead(size_t least, size_t most) {
  pthread_once(&once, start);
  if (mallinfo2().keepcost < least) {
    void *volatile ahead = malloc(most); /* or the compiler sees that nobody uses it */
    free(ahead);
  }
  const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), now = (uintptr_t)sbrk(0) / page * page;
  pthread_mutex_lock(&lock);
  if (touched > now) touched = now; /* it has shrunk */
  touched = touched / page * page;
  end = now;
  pthread_cond_signal(&is_work);
  pthread_mutex_unlock(&lock);
}

#else
void grow_heap_ahead(size_t least, size_t most) { (void)least, (void)most; }
#endif
