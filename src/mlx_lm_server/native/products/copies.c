/* Copies of many short runs of bytes, shared out to the threads of products. Nobody computes meanwhile.
 */
#include <stdatomic.h>
#include <string.h>

#include "threads.h"

/* A thread takes pieces of about so much at once. */
enum { TAKEN_BYTES = 128 * 1024 };

/* Addresses and lengths in bytes. Move `s` of array `a` copies from `sources[a] + from[s]` to
 * `targets[a] + to[s]`: `num_heads` runs of `lengths[s]`, which begin so many bytes apart. */
typedef struct {
  const long *sources, *targets;
  const long *from, *to, *lengths;
  long num_moves, num_heads, from_stride, to_stride;
  long num_pieces, at_once; /* a piece is a move of an array */
  atomic_long next;         /* the first piece that nobody has taken */
} copy_work;

static void copy_pieces(void *work) {
  copy_work *w = work;
  long first;
  while ((first = atomic_fetch_add(&w->next, w->at_once)) < w->num_pieces)
    for (long i = first; i < first + w->at_once && i < w->num_pieces; i++) {
      const long array = i / w->num_moves, move = i % w->num_moves;
      const char *source = (const char *)(w->sources[array] + w->from[move]);
      char *target = (char *)(w->targets[array] + w->to[move]);
      for (long head = 0; head < w->num_heads; head++)
        memcpy(target + head * w->to_stride, source + head * w->from_stride, w->lengths[move]);
    }
}

void copy_heads(long num_arrays, const long *sources, const long *targets, long num_moves,
                const long *from, const long *to, const long *lengths, long num_heads,
                long from_stride, long to_stride) {
  long num_bytes = 0;
  for (long move = 0; move < num_moves; move++) num_bytes += lengths[move];
  const long piece_bytes = num_moves > 0 ? num_bytes * num_heads / num_moves + 1 : 1;
  copy_work work = {sources, targets, from, to, lengths, num_moves, num_heads, from_stride, to_stride,
                    num_arrays * num_moves, TAKEN_BYTES / piece_bytes + 1, 0};
  if (work.num_pieces <= work.at_once) copy_pieces(&work);
  else share_out(copy_pieces, &work);
}
