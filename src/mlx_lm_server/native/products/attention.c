/* Attention without its scores ever leaving the cache ("FlashAttention", Dao et al. 2022, with the
 * running maximum of Milakov & Gimelshein 2018).
 *
 * The query heads that share K and V are folded: rows of the product are pairs of a token and a head,
 * and a block of rows lies *across* vectors, one row in each lane:
 *
 *     scores[key][row]  = sum_d  keys[key][d]   * queries[d][row]      x: a number, y: a vector
 *     sums[d][row]      = sum_t  values[t][d]   * weights[t][row]
 *
 * So K and V are read where they lie, in one pass per block, and the softmax needs no sum across a
 * vector. Tiles of keys begin at multiples of TILE_KEYS whatever the block, and a row's numbers do not
 * depend on the rows beside it: a token gets the same bits alone, beside others, and in a chunk that
 * is cut anywhere, as long as no window has made its slot a ring.
 */
#include "attention.h"

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#include "threads.h"
#include "token_attention.h"
#include "told.h"
#include "vectors.h"

enum { MAX_VECS = WIDTH == 16 ? 4 : 2, MAX_LANES = MAX_VECS * WIDTH };
/* Tiles take so many keys, or numbers of a value, at once: the sums and a row of y fill the registers. */
#define COUNT_OF(vecs) ((vecs) == MAX_VECS ? 6 : 8)
enum { REST_COUNT = 4 };
typedef struct {
  facts facts;
  const float *spans;
  const float *sinks;
  float *keys, *values;
  float *rows; /* [tokens][kv_heads][share][width] */
  long width;
  int lanes;              /* rows in a block */
  atomic_long next;       /* the next block that nobody has taken */
  atomic_int has_no_room; /* some thread had no memory to work in */
} attention;

/* One block of rows on its way through the keys. Arrays `[…][lanes]`. */
typedef struct {
  float *queries, *scores, *sums;
  float top[MAX_LANES], total[MAX_LANES];
  int first_key[MAX_LANES], end_key[MAX_LANES]; /* what a row sees */
} block;

/* ---- vectors */

enum { LINE = 16 }; /* floats in a line of the cache */

/* out[i][lane] = out[i][lane] * factor[lane] + sum_k x[i * x_step + k * x_next] * y[k][lane], for
 * `count` i's; without `factor` out is not read. What stands `ahead` of x is fetched meanwhile. */
INLINE void tile(int vecs, int count, long depth, const float *x, long x_step, long x_next,
                 const float *y, const float *factor, float *out, long ahead) {
  vec sums[8][MAX_VECS];
  const long lanes = vecs * WIDTH;
  UNROLL
  for (int i = 0; i < count; i++)
    UNROLL
    for (int v = 0; v < vecs; v++) sums[i][v] = vec_zero();
  _Pragma("GCC unroll 4")
  for (long k = 0; k < depth; k++) {
    vec row[MAX_VECS];
    UNROLL
    for (int v = 0; v < vecs; v++) row[v] = vec_load(y + k * lanes + v * WIDTH);
    if (x_step == 1) fetch(x + ahead + k * x_next);
    else if (k % LINE == 0)
      UNROLL
      for (int i = 0; i < count; i++) fetch(x + ahead + i * x_step + k);
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
                    const float *y, const float *factor, float *out, long ahead) {
  const int count = COUNT_OF(vecs);
  long i = 0;
#define TILE(count) \
  tile(vecs, count, depth, x + i * x_step, x_step, x_next, y, factor, out + i * vecs * WIDTH, ahead)
  for (; i + count <= num; i += count) TILE(count);
  for (; i + REST_COUNT <= num; i += REST_COUNT) TILE(REST_COUNT);
  for (; i < num; i++) TILE(1);
#undef TILE
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
  const int lanes = vecs * WIDTH, end = (num + CHAINS - 1) / CHAINS * CHAINS;
  for (int i = num * lanes; i < end * lanes; i += WIDTH) vec_store(b->scores + i, vec_fill(UNSEEN));
  for (int v = 0; v < vecs; v++) {
    float *column = b->scores + v * WIDTH;
    vec before = vec_load(b->top + v * WIDTH), tops[CHAINS], sums[CHAINS];
    UNROLL
    for (int i = 0; i < CHAINS; i++) tops[i] = before, sums[i] = vec_zero();
    for (int t = 0; t < end; t += CHAINS)
      UNROLL
      for (int i = 0; i < CHAINS; i++) tops[i] = vec_max(tops[i], vec_load(column + (t + i) * lanes));
    vec top = vec_max(vec_max(tops[0], tops[1]), vec_max(tops[2], tops[3]));
    for (int t = 0; t < end; t += CHAINS)
      UNROLL
      for (int i = 0; i < CHAINS; i++) {
        float *place = column + (t + i) * lanes;
        vec weight = exp_of(vec_sub(vec_load(place), top));
        vec_store(place, weight);
        sums[i] = vec_add(sums[i], weight);
      }
    vec sum = vec_add(vec_add(sums[0], sums[1]), vec_add(sums[2], sums[3]));
    vec change = exp_of(vec_sub(before, top));
    vec_store(b->total + v * WIDTH, vec_fma(vec_load(b->total + v * WIDTH), change, sum));
    vec_store(b->top + v * WIDTH, top);
    vec_store(factor + v * WIDTH, change);
  }
}

/* Over the keys from `first` to `end`; from `seen` to `all` every row sees them. */
INLINE void walk(block *b, int vecs, const float *keys, long key_dim, const float *values,
                 long value_dim, long first, long seen, long all, long end) {
  float factor[MAX_LANES];
  for (long t = first; t < end; t += TILE_KEYS) {
    int num = MIN(TILE_KEYS, end - t);
    product(vecs, num, key_dim, keys + t * key_dim, key_dim, 1, b->queries, NULL, b->scores,
            TILE_KEYS * key_dim);
    if (t < seen || t + num > all) mask(b, vecs * WIDTH, t, num);
    weigh(b, vecs, num, factor);
    product(vecs, value_dim, num, values + t * value_dim, 1, value_dim, b->scores, factor, b->sums,
            TILE_KEYS * value_dim);
  }
}

static void walk_block(block *b, int vecs, const float *keys, long key_dim, const float *values,
                       long value_dim) {
  long first = INT32_MAX, seen = 0, all = INT32_MAX, end = 0;
  for (int j = 0; j < vecs * WIDTH; j++) {
    first = MIN(first, b->first_key[j]);
    seen = MAX(seen, b->first_key[j]);
    all = MIN(all, b->end_key[j]);
    end = MAX(end, b->end_key[j]);
  }
  first = first / TILE_KEYS * TILE_KEYS;
#define WALK(vecs) walk(b, vecs, keys, key_dim, values, value_dim, first, seen, all, end)
  switch (vecs) {
    case 1: WALK(1); break;
    case 2: WALK(2); break;
#if WIDTH == 16
    case 3: WALK(3); break;
    case 4: WALK(4); break;
#endif
  }
}

/* Of rows of a span and a KV head: those of one token lie side by side. */
static float *row_of(const attention *a, const span *s, int kv_head, long row) {
  long share = a->facts.share, token = s->first_token + row / share;
  return a->rows + ((token * a->facts.kv_heads + kv_head) * share + row % share) * a->width;
}

/* Lanes beyond the last row repeat it. */
static void load_rows(const attention *a, block *b, const span *s, int kv_head, long first, int num,
                      int lanes) {
  const facts *f = &a->facts;
  for (int j = 0; j < lanes; j++) {
    long row = first + MIN(j, num - 1);
    int end = s->start + (int)(row / f->share) + 1;
    const float *query = row_of(a, s, kv_head, row);
    for (long d = 0; d < f->key_dim; d++) b->queries[d * lanes + j] = query[d] * f->scale;
    b->end_key[j] = end;
    b->first_key[j] = f->window ? MAX(0, end - f->window) : 0;
    b->top[j] = a->sinks ? a->sinks[kv_head * f->share + row % f->share] : UNSEEN;
    b->total[j] = a->sinks ? 1.0f : 0.0f;
  }
  memset(b->sums, 0, sizeof(float) * f->value_dim * lanes);
}

static void store_rows(const attention *a, const block *b, const span *s, int kv_head, long first,
                       int num, int lanes) {
  for (int j = 0; j < num; j++) {
    float *out = row_of(a, s, kv_head, first + j), share = 1.0f / b->total[j];
    for (long d = 0; d < a->facts.value_dim; d++) out[d] = b->sums[d * lanes + j] * share;
  }
}

static void show_keys(block *b, int lanes, int first, int end) {
  for (int j = 0; j < lanes; j++) b->first_key[j] = first, b->end_key[j] = end;
}

static void load_heads(const attention *a, heads *h, const span *s, int kv_head) {
  const facts *f = &a->facts;
  for (int j = 0; j < h->num; j++) {
    const float *query = row_of(a, s, kv_head, j);
    for (int d = 0; d < f->key_dim; d++) h->queries[j * h->key_dim + d] = query[d] * f->scale;
    h->top[j] = a->sinks ? a->sinks[kv_head * f->share + j] : UNSEEN;
    h->total[j] = a->sinks ? 1.0f : 0.0f;
  }
  memset(h->sums, 0, sizeof(float) * h->num * h->value_dim);
}

static void store_heads(const attention *a, const heads *h, const span *s, int kv_head) {
  const long value_dim = a->facts.value_dim;
  for (int j = 0; j < h->num; j++) {
    float *out = row_of(a, s, kv_head, j), share = 1.0f / h->total[j];
    for (int d = 0; d < value_dim; d++) out[d] = h->sums[j * value_dim + d] * share;
  }
}

/* The places that a single token sees, and how many of them begin at 0 again: token p lies in place
 * p % capacity. */
typedef struct {
  int begin, end, wrapped;
} places;

static places seen_by_token(const facts *f, const span *s) {
  const int seen = s->start + 1, held = MIN(f->window ? MIN(seen, f->window) : seen, f->capacity);
  const int begin = (seen - held) % f->capacity, end = begin + held;
  const int wrapped = MAX(0, end - f->capacity);
  return (places){begin, end - wrapped, wrapped};
}

static void attend_token(const attention *a, block *b, const span *s, int kv_head,
                         const float *keys, const float *values) {
  const facts *f = &a->facts;
  heads h = {f->share, f->key_dim, f->value_dim, b->queries, b->scores, b->sums, {0}, {0}};
  const places seen = seen_by_token(f, s);
  load_heads(a, &h, s, kv_head);
  walk_heads(&h, keys, values, seen.begin, seen.end);
  if (seen.wrapped) walk_heads(&h, keys, values, 0, seen.wrapped);
  store_heads(a, &h, s, kv_head);
}

static void attend_block(const attention *a, block *b, const span *s, int kv_head, long first,
                         int num) {
  const facts *f = &a->facts;
  const int vecs = (num + WIDTH - 1) / WIDTH, lanes = vecs * WIDTH;
  const long place = ((long)s->slot * f->kv_heads + kv_head) * f->capacity;
  const float *keys = a->keys + place * f->key_dim, *values = a->values + place * f->value_dim;
  if (s->num_tokens == 1 && can_walk(f->share, f->key_dim, f->value_dim)) {
    attend_token(a, b, s, kv_head, keys, values);
    return;
  }
  load_rows(a, b, s, kv_head, first, num, lanes);
  places seen = {0};
  if (s->num_tokens == 1) {
    seen = seen_by_token(f, s);
    show_keys(b, lanes, seen.begin, seen.end);
  }
  walk_block(b, vecs, keys, f->key_dim, values, f->value_dim);
  if (seen.wrapped) {
    show_keys(b, lanes, 0, seen.wrapped);
    walk_block(b, vecs, keys, f->key_dim, values, f->value_dim);
  }
  store_rows(a, b, s, kv_head, first, num, lanes);
}

/* ---- all of them */

static int reserve(block *b, const facts *f) {
  float *arrays = scratch(MAX_LANES * ((size_t)f->key_dim + TILE_KEYS + f->value_dim));
  if (!arrays) return 0;
  b->queries = arrays;
  b->scores = arrays + (long)MAX_LANES * f->key_dim;
  b->sums = b->scores + MAX_LANES * TILE_KEYS;
  return 1;
}

static long rows_in(const attention *a, const span *s) { return (long)s->num_tokens * a->facts.share; }

static void attend_blocks(void *work) {
  attention *a = work;
  block b;
  if (!reserve(&b, &a->facts)) {
    atomic_store(&a->has_no_room, 1);
    return;
  }
  long before = 0, number = atomic_fetch_add(&a->next, 1); /* blocks of the spans before; the block */
  for (int i = 0; i < a->facts.num_spans;) {
    const span s = span_at(a->spans, i);
    long num_rows = rows_in(a, &s), per_head = (num_rows + a->lanes - 1) / a->lanes;
    if (number - before >= per_head * a->facts.kv_heads) {
      before += per_head * a->facts.kv_heads;
      i++;
      continue;
    }
    long first = (number - before) % per_head * a->lanes;
    int kv_head = (number - before) / per_head;
    attend_block(a, &b, &s, kv_head, first, MIN(a->lanes, num_rows - first));
    number = atomic_fetch_add(&a->next, 1);
  }
}

/* As many rows as the registers hold, fewer where some thread would get none. */
static int lanes_for(const attention *a) {
  long most = 0;
  for (int i = 0; i < a->facts.num_spans; i++) {
    const span s = span_at(a->spans, i);
    most = MAX(most, rows_in(a, &s));
  }
  long share = most * a->facts.num_spans * a->facts.kv_heads / num_threads();
  return MAX(WIDTH, MIN(MAX_LANES, (share + WIDTH - 1) / WIDTH * WIDTH));
}

static double multiplications(const attention *a) {
  const facts *f = &a->facts;
  double scores = 0;
  for (int i = 0; i < f->num_spans; i++) {
    const span s = span_at(a->spans, i);
    const long end = (long)s.start + s.num_tokens;
    scores += (double)rows_in(a, &s) * (f->window ? MIN(end, f->window) : end);
  }
  return scores * f->kv_heads * ((double)f->key_dim + f->value_dim);
}

/* Rows [tokens][kv_heads][width] go to their places in a slab. Token p lies in place p % capacity. */
static void write_rows(const attention *a, const float *rows, float *slab, long dim) {
  const facts *f = &a->facts;
  for (long number = 0; number < f->num_spans; number++) {
    const span s = span_at(a->spans, number);
    for (long i = 0; i < s.num_tokens; i++)
      for (long head = 0; head < f->kv_heads; head++) {
        const float *row = rows + ((s.first_token + i) * f->kv_heads + head) * a->width;
        const long slot_head = (long)s.slot * f->kv_heads + head;
        float *place = slab + (slot_head * f->capacity + (s.start + i) % f->capacity) * dim;
        memcpy(place, row, sizeof(float) * dim);
      }
  }
}

int attend(float *keys, float *values, long num_rows, long width, float *told) {
  attention a = {.keys = keys, .values = values, .width = width};
  if (num_rows * width < NUMBERS_OF_FACTS) return 0;
  memcpy(&a.facts, told, sizeof a.facts);
  a.spans = told + NUMBERS_OF_FACTS;
  if (!can_be_true(&a.facts, a.spans, num_rows, width)) return 0;
  a.sinks = a.facts.sinks_at ? told + a.facts.sinks_at : NULL;
  a.rows = told + a.facts.first_row * width;
  a.lanes = lanes_for(&a);
  if (a.facts.has_new) {
    const long kv_rows = (long)a.facts.num_tokens * a.facts.kv_heads;
    const float *rows = a.rows + kv_rows * a.facts.share * width;
    write_rows(&a, rows, keys, a.facts.key_dim);
    write_rows(&a, rows + kv_rows * width, values, a.facts.value_dim);
  }
  if (multiplications(&a) < MIN_SHARED_WORK) attend_blocks(&a);
  else share_out(attend_blocks, &a);
  return !atomic_load(&a.has_no_room);
}
