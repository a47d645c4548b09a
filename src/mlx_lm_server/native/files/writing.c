/* Writes to a new file. What is written does not go through the system's cache, where the file system
 * lets us: copying it there and bringing it from there to the medium takes twice the CPU time.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "media.h"

#ifndef O_DIRECT
#define O_DIRECT 0
#endif

enum { STAGING_BYTES = 1 << 20, MAX_IN_PLACE = 16 };

struct pieces {
  int num_pieces;
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

/* Where reading of the pieces has come to. */
struct spot {
  int piece;
  long offset;
};

static void skip(const struct pieces *w, struct spot *at, long num_bytes) {
  at->offset += num_bytes;
  while (at->piece < w->num_pieces && at->offset >= w->sizes[at->piece])
    at->offset -= w->sizes[at->piece++];
}

/* The next bytes of the pieces, up to STAGING_BYTES; `at` is where they begin and then where they
 * end. */
static long gather(const struct pieces *w, char *into, struct spot *at) {
  long had = 0;
  skip(w, at, 0);
  while (at->piece < w->num_pieces && had < STAGING_BYTES) {
    long left = w->sizes[at->piece] - at->offset, room = STAGING_BYTES - had;
    long taken = left < room ? left : room;
    memcpy(into + had, w->pieces[at->piece] + at->offset, taken);
    had += taken;
    skip(w, at, taken);
  }
  return had;
}

/* A direct write of the pieces from where they lie: what was written, 0 where it cannot be done so, or
 * -errno. Each has to end at a sector; those that do not begin at one, such as a header, are copied. */
static long write_in_place(int fd, const struct pieces *w, char *staging, long position) {
  struct iovec parts[MAX_IN_PLACE];
  long copied = 0;
  if (!is_direct(fd) || position % SECTOR_BYTES || w->num_pieces > MAX_IN_PLACE) return 0;
  for (int i = 0; i < w->num_pieces; i++) {
    const char *from = w->pieces[i];
    const long size = w->sizes[i];
    if (size % SECTOR_BYTES) return 0;
    if ((uintptr_t)from % SECTOR_BYTES) {
      if (size > STAGING_BYTES - copied) return 0;
      from = memcpy(staging + copied, from, size);
      copied += size;
    }
    parts[i] = (struct iovec){(void *)from, size};
  }
  long wrote = pwritev(fd, parts, w->num_pieces, position);
  /* A medium may have larger sectors. */
  return wrote >= 0 ? wrote : errno == EINVAL || errno == EINTR ? 0 : -errno;
}

/* Whether each piece is somewhere, and a file can hold them all behind `position`. */
static int can_be_written(const struct pieces *w, long position) {
  long end = position;
  if (w->num_pieces < 0 || !w->pieces || !w->sizes) return 0;
  for (int i = 0; i < w->num_pieces; i++)
    if (w->sizes[i] < 0 || (w->sizes[i] > 0 && !w->pieces[i]) ||
        __builtin_add_overflow(end, w->sizes[i], &end))
      return 0;
  return end <= LONG_MAX - PAGE_BYTES;
}

/* All pieces, at the file's position: 0, or -errno with something of them written or nothing. */
int write_pieces(int fd, const char *const *pieces, const long *sizes, int num_pieces) {
  const struct pieces all = {num_pieces, pieces, sizes};
  static __thread char *staging;
  if (staging == NULL && posix_memalign((void **)&staging, PAGE_BYTES, STAGING_BYTES) != 0) {
    staging = NULL;
    return -ENOMEM;
  }
  long position = lseek(fd, 0, SEEK_CUR), had;
  if (position < 0) return -errno;
  if (!can_be_written(&all, position)) return -EINVAL;
  struct spot at = {0, 0};
  long wrote = write_in_place(fd, &all, staging, position);
  if (wrote < 0) return wrote;
  skip(&all, &at, wrote);
  for (position += wrote; (had = gather(&all, staging, &at)) > 0; position += had) {
    long whole = (had + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
    long num_bytes = is_direct(fd) && position % PAGE_BYTES == 0 ? whole : had;
    memset(staging + had, 0, num_bytes - had);
    int error = write_at(fd, staging, num_bytes, position);
    if (error != 0) return error;
    if (num_bytes > had && ftruncate(fd, position + had) != 0) return -errno;
  }
  return lseek(fd, position, SEEK_SET) < 0 ? -errno : 0;
}
