/* Attention of a chunk without its scores ever leaving the cache ("FlashAttention", Dao et al. 2022,
 * with the running maximum of Milakov & Gimelshein 2018).
 *
 * The query heads that share K and V are folded: rows of the product are pairs of a position and a
 * head, and a block of rows lies *across* vectors, one row in each lane:
 *
 *     scores[key][row]  = sum_d  keys[key][d]   * queries[d][row]      x: a number, y: a vector
 *     sums[d][row]      = sum_t  values[t][d]   * weights[t][row]
 *
 * So K and V are read where they lie, in one pass per block, and the softmax needs no sum across a
 * vector. Tiles of keys begin at multiples of TILE_KEYS whatever the block, and a row's numbers do not
 * depend on the rows beside it: a chunk gives the same bits however a prompt is cut.
 */
#include "attention.h"

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "threads.h"
#include "vectors.h"

enum { TILE_KEYS = 64, MAX_VECS = WIDTH == 16 ? 4 : 2, MAX_LANES = MAX_VECS * WIDTH };
/* Tiles take so many keys, or numbers of a value, at once: the sums and a row of y fill the registers. */
#define COUNT_OF(vecs) (WIDTH == 16 ? ((vecs) > 2 ? 4 : 8) : ((vecs) > 1 ? 4 : 8))
enum { DIM_MULTIPLE = 8 };
/* What a row has not seen; finite, so that it can be subtracted from itself. */
#define UNSEEN -1e30f
/* Weights below exp of this are 0: they vanish beside the largest, which is 1, and a product with a
 * number that small may be a denormal one, which costs a hundred cycles. */
#define LOWEST_EXPONENT -60.0f
/* Below this many multiplications waking a thread costs more than it saves. */
enum { MIN_SHARED_WORK = 400 * 1000 };

/* What `packed` begins with. */
typedef struct {
  const float *keys;
  int32_t num_queries, share, start, window, key_dim, has_sinks; /* window 0: none */
  float scale;
  int32_t unused;
} chunk_head;

typedef struct {
  chunk_head head;
  const float *sinks, *queries, *values;
  long num_keys, value_dim;
  float *out;
  int lanes;       /* rows in a block */
  atomic_int next; /* the next row that nobody has taken */
} chunk;

/* One block of rows on its way through the keys. Arrays `[…][lanes]`. */
typedef struct {
  float *queries, *scores, *sums;
  float top[MAX_LANES], total[MAX_LANES];
  int first_key[MAX_LANES], end_key[MAX_LANES]; /* what a row sees */
} block;

/* ---- vectors */

/* exp of x <= 0, to 3e-7; after Cody & Waite 1980 with the terms of Cephes expf. */
INLINE vec exp_of(vec x) {
  const float round = 12582912.0f; /* 1.5 * 2^23: what is added to it loses its fraction */
  vec shifted = vec_fma(x, vec_fill(1.44269504f), vec_fill(round));
  vec whole = vec_sub(shifted, vec_fill(round));
  vec rest = vec_fma(whole, vec_fill(-0.693359375f), x);
  rest = vec_fma(whole, vec_fill(2.12194440e-4f), rest);
  vec series = vec_fill(1.9875691500e-4f);
  series = vec_fma(series, rest, vec_fill(1.3981999507e-3f));
  series = vec_fma(series, rest, vec_fill(8.3334519073e-3f));
  series = vec_fma(series, rest, vec_fill(4.1665795894e-2f));
  series = vec_fma(series, rest, vec_fill(1.6666665459e-1f));
  series = vec_fma(series, rest, vec_fill(5.0000001201e-1f));
  vec power = vec_add(vec_fma(vec_mul(series, rest), rest, rest), vec_fill(1.0f));
  return vec_unless_less(x, vec_fill(LOWEST_EXPONENT), vec_times_power(power, shifted));
}

/* out[i][lane] = out[i][lane] * factor[lane] + sum_k x[i * x_step + k * x_next] * y[k][lane], for
 * `count` i's; without `factor` out is not read. */
INLINE void tile(int vecs, int count, long depth, const float *x, long x_step, long x_next,
                 const float *y, const float *factor, float *out) {
  vec sums[8][MAX_VECS];
  const long lanes = vecs * WIDTH;
  UNROLL
  for (int i = 0; i < count; i++)
    UNROLL
    for (int v = 0; v < vecs; v++) sums[i][v] = vec_zero();
  for (long k = 0; k < depth; k++) {
    vec row[MAX_VECS];
    UNROLL
    for (int v = 0; v < vecs; v++) row[v] = vec_load(y + k * lanes + v * WIDTH);
    UNROLL
    for (int i = 0; i < count; i++) {
      vec number = vec_fill(x[i * x_step + k * x_next]);
      UNROLL
      for (int v = 0; v < vecs; v++) sums[i][v] = vec_fma(number, row[v], sums[i][v]);
    }
  }
  UNROLL
  for (int i = 0; i < count; i++)
    UNROLL
    for (int v = 0; v < vecs; v++) {
      float *place = out + i * lanes + v * WIDTH;
      vec sum = sums[i][v];
      if (factor) sum = vec_fma(vec_load(place), vec_load(factor + v * WIDTH), sum);
      vec_store(place, sum);
    }
}

INLINE void product(int vecs, long num, long depth, const float *x, long x_step, long x_next,
                    const float *y, const float *factor, float *out) {
  const int count = COUNT_OF(vecs);
  const long lanes = vecs * WIDTH;
  long i = 0;
  for (; i + count <= num; i += count)
    tile(vecs, count, depth, x + i * x_step, x_step, x_next, y, factor, out + i * lanes);
  for (; i < num; i++)
    tile(vecs, 1, depth, x + i * x_step, x_step, x_next, y, factor, out + i * lanes);
}

/* ---- a block of rows */

static void mask(block *b, int lanes, long first, int num) {
  for (int t = 0; t < num; t++)
    for (int j = 0; j < lanes; j++) {
      int key = first + t;
      float *score = b->scores + t * lanes + j;
      *score = key >= b->first_key[j] && key < b->end_key[j] ? *score : UNSEEN;
    }
}

/* Scores become weights; `factor` is what all that was summed up before must be multiplied by. */
INLINE void weigh(block *b, int vecs, int num, float *factor) {
  const int lanes = vecs * WIDTH;
  for (int v = 0; v < vecs; v++) {
    float *column = b->scores + v * WIDTH;
    vec before = vec_load(b->top + v * WIDTH), top = before;
    for (int t = 0; t < num; t++) top = vec_max(top, vec_load(column + t * lanes));
    vec change = exp_of(vec_sub(before, top));
    vec total = vec_mul(vec_load(b->total + v * WIDTH), change);
    for (int t = 0; t < num; t++) {
      vec weight = exp_of(vec_sub(vec_load(column + t * lanes), top));
      vec_store(column + t * lanes, weight);
      total = vec_add(total, weight);
    }
    vec_store(b->top + v * WIDTH, top);
    vec_store(b->total + v * WIDTH, total);
    vec_store(factor + v * WIDTH, change);
  }
}

/* Over the keys from `first` to `end`; from `seen` to `all` every row sees them. */
INLINE void walk(const chunk *c, block *b, int vecs, long first, long seen, long all, long end) {
  const long key_dim = c->head.key_dim, value_dim = c->value_dim;
  float factor[MAX_LANES];
  for (long t = first; t < end; t += TILE_KEYS) {
    int num = MIN(TILE_KEYS, end - t);
    product(vecs, num, key_dim, c->head.keys + t * key_dim, key_dim, 1, b->queries, NULL, b->scores);
    if (t < seen || t + num > all) mask(b, vecs * WIDTH, t, num);
    weigh(b, vecs, num, factor);
    product(vecs, value_dim, num, c->values + t * value_dim, 1, value_dim, b->scores, factor, b->sums);
  }
}

static void walk_block(const chunk *c, block *b, int vecs) {
  long first = c->num_keys, seen = 0, all = c->num_keys, end = 0;
  for (int j = 0; j < vecs * WIDTH; j++) {
    first = MIN(first, b->first_key[j]);
    seen = MAX(seen, b->first_key[j]);
    all = MIN(all, b->end_key[j]);
    end = MAX(end, b->end_key[j]);
  }
  first = first / TILE_KEYS * TILE_KEYS;
  switch (vecs) {
    case 1: walk(c, b, 1, first, seen, all, end); break;
    case 2: walk(c, b, 2, first, seen, all, end); break;
#if WIDTH == 16
    case 3: walk(c, b, 3, first, seen, all, end); break;
    case 4: walk(c, b, 4, first, seen, all, end); break;
#endif
  }
}

/* Where a row's query begins among those of all heads; rows of one position lie side by side. */
static long place_of(const chunk_head *head, long row) {
  return row % head->share * head->num_queries + row / head->share;
}

/* Lanes beyond the last row repeat it. */
static void load_rows(const chunk *c, block *b, long first, int num, int lanes) {
  const chunk_head *head = &c->head;
  for (int j = 0; j < lanes; j++) {
    long row = first + MIN(j, num - 1);
    int position = head->start + (int)(row / head->share);
    const float *query = c->queries + place_of(head, row) * head->key_dim;
    for (int d = 0; d < head->key_dim; d++) b->queries[d * lanes + j] = query[d] * head->scale;
    b->end_key[j] = position + 1;
    b->first_key[j] = head->window ? MAX(0, position + 1 - head->window) : 0;
    b->top[j] = head->has_sinks ? c->sinks[row % head->share] : UNSEEN;
    b->total[j] = head->has_sinks ? 1.0f : 0.0f;
  }
  memset(b->sums, 0, sizeof(float) * c->value_dim * lanes);
}

static void store_rows(const chunk *c, const block *b, long first, int num, int lanes) {
  for (int j = 0; j < num; j++) {
    float *out = c->out + place_of(&c->head, first + j) * c->value_dim;
    float share = 1.0f / b->total[j];
    for (int d = 0; d < c->value_dim; d++) out[d] = b->sums[d * lanes + j] * share;
  }
}

/* The arrays of the calling thread's block; they live as long as the thread. */
static int reserve(block *b, long key_dim, long value_dim) {
  static __thread float *arrays;
  static __thread size_t capacity;
  size_t size = sizeof(float) * MAX_LANES * (key_dim + TILE_KEYS + value_dim);
  if (size > capacity) {
    free(arrays);
    arrays = aligned_alloc(64, (size + 63) / 64 * 64);
    capacity = arrays ? size : 0;
  }
  b->queries = arrays;
  b->scores = arrays + MAX_LANES * key_dim;
  b->sums = b->scores + MAX_LANES * TILE_KEYS;
  return arrays != NULL;
}

/* ---- a chunk */

static void attend_blocks(void *work) {
  chunk *c = work;
  long num_rows = (long)c->head.num_queries * c->head.share;
  block b;
  if (!reserve(&b, c->head.key_dim, c->value_dim)) abort();
  for (;;) {
    long first = atomic_fetch_add_explicit(&c->next, c->lanes, memory_order_relaxed);
    if (first >= num_rows) return;
    int num = MIN(c->lanes, num_rows - first), vecs = (num + WIDTH - 1) / WIDTH;
    load_rows(c, &b, first, num, vecs * WIDTH);
    walk_block(c, &b, vecs);
    store_rows(c, &b, first, num, vecs * WIDTH);
  }
}

int can_attend(const float *packed, long value_dim) {
  chunk_head head;
  memcpy(&head, packed, sizeof head);
  return head.key_dim % DIM_MULTIPLE == 0 && value_dim % DIM_MULTIPLE == 0;
}

/* As many rows as the registers hold, fewer where some thread would get none. */
static int lanes_for(long num_rows) {
  long share = (num_rows + num_threads() - 1) / num_threads();
  return MIN(MAX_LANES, (share + WIDTH - 1) / WIDTH * WIDTH);
}

void attend(const float *packed, const float *values, long num_keys, long value_dim, float *out) {
  chunk c = {.values = values, .num_keys = num_keys, .value_dim = value_dim, .out = out};
  memcpy(&c.head, packed, sizeof c.head);
  c.sinks = packed + sizeof c.head / sizeof(float);
  c.queries = c.sinks + (c.head.has_sinks ? c.head.share : 0);
  long num_rows = (long)c.head.num_queries * c.head.share;
  double work = (double)num_rows * num_keys * (c.head.key_dim + value_dim);
  c.lanes = work < MIN_SHARED_WORK ? MAX_LANES : lanes_for(num_rows);
  if (work < MIN_SHARED_WORK) attend_blocks(&c);
  else share_out(attend_blocks, &c);
}
