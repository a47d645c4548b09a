/* Writes to a new file, if wanted only while a core is idle: threads that compute a product wait
 * for each other, and whoever takes one's core stops all of them.
 *
 * What is written does not go through the system's cache, where the file system lets us: copying it
 * there and bringing it from there to the medium takes twice the CPU time.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef O_DIRECT
#define O_DIRECT 0
#endif

enum { PAGE_BYTES = 4096, STAGING_BYTES = 1 << 20 };

struct writing {
  int fd, num_pieces;
  const char *const *pieces;
  const long *sizes;
};

static int is_direct(int fd) { return O_DIRECT && (fcntl(fd, F_GETFL) & O_DIRECT); }

static void make_usual(int fd) { fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_DIRECT); }

/* All of it, or -errno. A direct write has to begin and end at a page. */
static int write_at(int fd, const char *from, long num_bytes, long position) {
  while (num_bytes > 0) {
    if ((position % PAGE_BYTES || num_bytes % PAGE_BYTES) && is_direct(fd)) make_usual(fd);
    long wrote = pwrite(fd, from, num_bytes, position);
    if (wrote > 0) {
      from += wrote, position += wrote, num_bytes -= wrote;
    } else if (wrote < 0 && errno == EINVAL && is_direct(fd)) {
      make_usual(fd);
    } else if (wrote == 0 || errno != EINTR) {
      return wrote == 0 ? -EIO : -errno;
    }
  }
  return 0;
}

/* The next bytes of the pieces, up to STAGING_BYTES; `piece` and `offset` say where they begin and
 * then where they end. */
static long gather(const struct writing *w, char *into, int *piece, long *offset) {
  long had = 0;
  while (*piece < w->num_pieces && had < STAGING_BYTES) {
    long left = w->sizes[*piece] - *offset, room = STAGING_BYTES - had;
    long taken = left < room ? left : room;
    memcpy(into + had, w->pieces[*piece] + *offset, taken);
    had += taken;
    *offset += taken;
    if (*offset == w->sizes[*piece]) *piece += 1, *offset = 0;
  }
  return had;
}

/* At the file's position: all pieces, and where that fails -errno. */
static int write_pieces_now(const struct writing *w) {
  static __thread char *staging;
  if (staging == NULL && posix_memalign((void **)&staging, PAGE_BYTES, STAGING_BYTES) != 0) {
    staging = NULL;
    return -ENOMEM;
  }
  long position = lseek(w->fd, 0, SEEK_CUR), offset = 0, had;
  if (position < 0) return -errno;
  for (int piece = 0; (had = gather(w, staging, &piece, &offset)) > 0; position += had) {
    long whole = (had + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
    long num_bytes = is_direct(w->fd) && position % PAGE_BYTES == 0 ? whole : had;
    memset(staging + had, 0, num_bytes - had);
    int error = write_at(w->fd, staging, num_bytes, position);
    if (error != 0) return error;
    if (num_bytes > had && ftruncate(w->fd, position + had) != 0) return -errno;
  }
  return lseek(w->fd, position, SEEK_SET) < 0 ? -errno : 0;
}

/* ---- the thread that only runs on idle cores */

static struct {
  pthread_mutex_t owner, lock;
  pthread_cond_t has_work, is_done;
  const struct writing *work;
  int result, is_there;
} idle = {.owner = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .has_work = PTHREAD_COND_INITIALIZER,
          .is_done = PTHREAD_COND_INITIALIZER};

#ifdef SCHED_IDLE
static void *write_when_idle(void *unused) {
  pthread_mutex_lock(&idle.lock);
  for (;;) {
    while (idle.work == NULL) pthread_cond_wait(&idle.has_work, &idle.lock);
    const struct writing *work = idle.work;
    pthread_mutex_unlock(&idle.lock);
    int result = write_pieces_now(work);
    pthread_mutex_lock(&idle.lock);
    idle.result = result;
    idle.work = NULL;
    pthread_cond_signal(&idle.is_done);
  }
  return unused;
}

static int start_idle_thread(void) {
  pthread_t thread;
  struct sched_param no_priority = {0};
  if (pthread_create(&thread, NULL, write_when_idle, NULL) != 0) return 0;
  pthread_detach(thread);
  return pthread_setschedparam(thread, SCHED_IDLE, &no_priority) == 0;
}
#else
static int start_idle_thread(void) { return 0; }
#endif

/* All pieces, at the file's position: 0, or -errno with something of them written or nothing. Where
 * it waits for an idle core, that may take long on a machine that has none. */
int write_pieces(int fd, const char *const *pieces, const long *sizes, int num_pieces,
                 int when_idle) {
  struct writing work = {fd, num_pieces, pieces, sizes};
  if (!when_idle || pthread_mutex_trylock(&idle.owner) != 0) return write_pieces_now(&work);
  if (!idle.is_there) idle.is_there = start_idle_thread() ? 1 : -1;
  int result;
  if (idle.is_there < 0) {
    result = write_pieces_now(&work);
  } else {
    pthread_mutex_lock(&idle.lock);
    idle.work = &work;
    pthread_cond_signal(&idle.has_work);
    while (idle.work != NULL) pthread_cond_wait(&idle.is_done, &idle.lock);
    result = idle.result;
    pthread_mutex_unlock(&idle.lock);
  }
  pthread_mutex_unlock(&idle.owner);
  return result;
}
