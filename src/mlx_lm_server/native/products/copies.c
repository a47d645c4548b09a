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
      for (long head = 0; head < w->num_heads && w->lengths[move]; head++)
        memcpy(target + head * w->to_stride, source + head * w->from_stride, w->lengths[move]);
    }
}

/* Whether all lengths are known and no number of bytes is more than an address can say. */
static int make_sense(long num_arrays, long num_moves, const long *lengths, long num_heads,
                      long from_stride, long to_stride, long *num_bytes) {
  const long stride = from_stride > to_stride ? from_stride : to_stride;
  long extent, num_pieces;
  if (num_arrays < 0 || num_moves < 0 || num_heads < 0 || from_stride < 0 || to_stride < 0) return 0;
  if (__builtin_mul_overflow(num_arrays, num_moves, &num_pieces)) return 0;
  if (__builtin_mul_overflow(num_heads, stride, &extent)) return 0;
  *num_bytes = 0;
  for (long move = 0; move < num_moves; move++)
    if (lengths[move] < 0 || __builtin_add_overflow(*num_bytes, lengths[move], num_bytes)) return 0;
  return !__builtin_mul_overflow(*num_bytes, num_heads, num_bytes);
}

/* 0, and nothing is copied, where the numbers make no sense. */
int copy_heads(long num_arrays, const long *sources, const long *targets, long num_moves,
               const long *from, const long *to, const long *lengths, long num_heads,
               long from_stride, long to_stride) {
  long num_bytes;
  if (!sources || !targets || !from || !to || !lengths) return 0;
  if (!make_sense(num_arrays, num_moves, lengths, num_heads, from_stride, to_stride, &num_bytes)) return 0;
  const long piece_bytes = num_bytes > num_moves ? num_bytes / num_moves : 1;
  copy_work work = {sources, targets, from, to, lengths, num_moves, num_heads, from_stride, to_stride,
                    num_arrays * num_moves, TAKEN_BYTES / piece_bytes + 1, 0};
  if (work.num_pieces <= work.at_once) copy_pieces(&work);
  else share_out(copy_pieces, &work);
  return 1;
}
