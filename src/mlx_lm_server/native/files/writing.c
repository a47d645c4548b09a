/* Writes to a new file. What is written does not go through the system's cache, where the file system
 * lets us: copying it there and bringing it from there to the medium takes twice the CPU time.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef O_DIRECT
#define O_DIRECT 0
#endif

enum { PAGE_BYTES = 4096, STAGING_BYTES = 1 << 20 };

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

/* The next bytes of the pieces, up to STAGING_BYTES; `piece` and `offset` say where they begin and
 * then where they end. */
static long gather(const struct pieces *w, char *into, int *piece, long *offset) {
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

/* All pieces, at the file's position: 0, or -errno with something of them written or nothing. */
int write_pieces(int fd, const char *const *pieces, const long *sizes, int num_pieces) {
  const struct pieces all = {num_pieces, pieces, sizes};
  static __thread char *staging;
  if (staging == NULL && posix_memalign((void **)&staging, PAGE_BYTES, STAGING_BYTES) != 0) {
    staging = NULL;
    return -ENOMEM;
  }
  long position = lseek(fd, 0, SEEK_CUR), offset = 0, had;
  if (position < 0) return -errno;
  for (int piece = 0; (had = gather(&all, staging, &piece, &offset)) > 0; position += had) {
    long whole = (had + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
    long num_bytes = is_direct(fd) && position % PAGE_BYTES == 0 ? whole : had;
    memset(staging + had, 0, num_bytes - had);
    int error = write_at(fd, staging, num_bytes, position);
    if (error != 0) return error;
    if (num_bytes > had && ftruncate(fd, position + had) != 0) return -errno;
  }
  return lseek(fd, position, SEEK_SET) < 0 ? -errno : 0;
}
