/* Reads whole files, several at a time, each to memory of its own, while the caller does other
 * things: one after the other leaves a fast medium idle. What is read does not stay in the system's
 * cache, where the file system lets us say so.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#include "media.h"

#ifndef O_DIRECT
#define O_DIRECT 0
#endif

enum { MAX_THREADS = 16 };

static const long NOT_YET = LONG_MIN;

/* `into[i]` begins at a page and has room for `max_bytes[i]`, in whole pages. */
struct reading {
  int num_files, next, num_threads;
  const char *const *paths;
  char *const *into;
  const long *max_bytes;
  long *result; /* bytes, or -errno */
  pthread_mutex_t lock;
  pthread_cond_t has_result;
  pthread_t threads[MAX_THREADS];
};

static int open_uncached(const char *path) {
  int fd = open(path, O_RDONLY | O_CLOEXEC | O_DIRECT);
  if (O_DIRECT && fd < 0 && (errno == EINVAL || errno == EOPNOTSUPP))
    fd = open(path, O_RDONLY | O_CLOEXEC);
#ifdef F_NOCACHE
  if (fd >= 0) fcntl(fd, F_NOCACHE, 1);
#endif
  return fd;
}

/* Up to `max_bytes` of the file. A direct read starts at a sector; one that ends within a sector is
 * at the file's end. */
static long read_file(const char *path, char *into, long max_bytes) {
  if (!path || !into || max_bytes < 0 || max_bytes > LONG_MAX - PAGE_BYTES) return -EINVAL;
  int fd = open_uncached(path);
  if (fd < 0) return -errno;
  long had = 0, result = 0;
  while (had < max_bytes && had % SECTOR_BYTES == 0) {
    long wanted = (max_bytes - had + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
    long got = pread(fd, into + had, wanted, had);
    if (got > 0) {
      had += got;
    } else if (got < 0 && errno == EINVAL && O_DIRECT && (fcntl(fd, F_GETFL) & O_DIRECT)) {
      fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_DIRECT);
    } else if (got == 0 || errno != EINTR) {
      result = got == 0 ? 0 : -errno;
      break;
    }
  }
  close(fd);
  if (result < 0) return result;
  return had < max_bytes ? had : max_bytes;
}

static void *work(void *argument) {
  struct reading *reading = argument;
  pthread_mutex_lock(&reading->lock);
  while (reading->next < reading->num_files) {
    int i = reading->next++;
    pthread_mutex_unlock(&reading->lock);
    long result = read_file(reading->paths[i], reading->into[i], reading->max_bytes[i]);
    pthread_mutex_lock(&reading->lock);
    reading->result[i] = result;
    pthread_cond_broadcast(&reading->has_result);
  }
  pthread_mutex_unlock(&reading->lock);
  return NULL;
}

/* NULL where memory is short, or an array is missing. The arrays stay the caller's, until `end_reading`. */
struct reading *begin_reading(int num_files, const char *const *paths, char *const *into,
                              const long *max_bytes, int num_threads) {
  if (num_files < 0 || !paths || !into || !max_bytes) return NULL;
  struct reading *reading = calloc(1, sizeof *reading);
  long *result = malloc(((size_t)num_files + 1) * sizeof *result);
  if (reading == NULL || result == NULL) {
    free(reading);
    free(result);
    return NULL;
  }
  for (int i = 0; i < num_files; i++) result[i] = NOT_YET;
  reading->num_files = num_files;
  reading->paths = paths;
  reading->into = into;
  reading->max_bytes = max_bytes;
  reading->result = result;
  pthread_mutex_init(&reading->lock, NULL);
  pthread_cond_init(&reading->has_result, NULL);
  for (int i = 0; i < num_threads && i < num_files && i < MAX_THREADS; i++) {
    if (pthread_create(&reading->threads[reading->num_threads], NULL, work, reading) != 0) break;
    reading->num_threads++;
  }
  if (reading->num_threads == 0) work(reading);
  return reading;
}

/* Of file `i`, once it is read: how many bytes, or -errno. */
long result_of(struct reading *reading, int i) {
  if (!reading || i < 0 || i >= reading->num_files) return -EINVAL;
  pthread_mutex_lock(&reading->lock);
  while (reading->result[i] == NOT_YET) pthread_cond_wait(&reading->has_result, &reading->lock);
  long result = reading->result[i];
  pthread_mutex_unlock(&reading->lock);
  return result;
}

/* Reads no further file, waits for those that are being read, and frees. */
void end_reading(struct reading *reading) {
  if (!reading) return;
  pthread_mutex_lock(&reading->lock);
  reading->next = reading->num_files;
  pthread_mutex_unlock(&reading->lock);
  for (int i = 0; i < reading->num_threads; i++) pthread_join(reading->threads[i], NULL);
  pthread_cond_destroy(&reading->has_result);
  pthread_mutex_destroy(&reading->lock);
  free(reading->result);
  free(reading);
}
