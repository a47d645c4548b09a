#include "told.h"

#define NAME(name) #name " "
/* Of the facts and of a span; a caller that has others must not call. */
const char *const attention_fields = FACTS(NAME, NAME) "/ " SPAN(NAME);

static int are_positive(const int32_t *numbers, int count) {
  for (int i = 0; i < count; i++)
    if (numbers[i] <= 0) return 0;
  return 1;
}

/* Whether K and V of such a size can be anywhere. */
static int is_slab(const facts *f) {
  const int32_t sizes[] = {f->num_slots, f->kv_heads, f->capacity, f->key_dim, f->value_dim};
  const int32_t dim = f->key_dim > f->value_dim ? f->key_dim : f->value_dim;
  const int64_t heads = (int64_t)f->num_slots * f->kv_heads;
  int64_t size;
  return are_positive(sizes, 5) && !__builtin_mul_overflow(heads, f->capacity, &size) &&
         !__builtin_mul_overflow(size, dim * (int64_t)sizeof(float), &size);
}

/* Whether the queries, and K and V with them, end where the rows do. */
static int end_with(const facts *f, int64_t num_rows) {
  const int64_t heads = (int64_t)f->kv_heads * f->share;
  const int64_t rows_of_token = heads + (f->has_new ? 2 * (int64_t)f->kv_heads : 0);
  return rows_of_token <= num_rows && f->first_row + f->num_tokens * rows_of_token == num_rows;
}

/* Whether it comes after all spans and before the queries. */
static int is_between(const facts *f, int64_t first, int64_t count, int64_t width) {
  const int64_t begin = NUMBERS_OF_FACTS + (int64_t)f->num_spans * NUMBERS_OF_SPAN;
  return first >= begin && first + count <= f->first_row * width;
}

/* A single token may look back around the end of its slot. */
static int is_in_slot(const facts *f, const span *s) {
  const int64_t end = (int64_t)s->start + s->num_tokens;
  if (s->slot < 0 || s->slot >= f->num_slots || s->start < 0) return 0;
  return end <= f->capacity || (s->num_tokens == 1 && f->window && end <= INT32_MAX);
}

int can_be_true(const facts *f, const float *spans, long num_rows, long width) {
  if (!is_slab(f) || f->share <= 0 || f->key_dim > width || f->value_dim > width) return 0;
  if (f->num_spans < 0 || f->num_tokens < 0 || f->window < 0 || !end_with(f, num_rows)) return 0;
  if (!is_between(f, (int64_t)f->first_row * width, 0, width)) return 0;
  if (f->sinks_at && !is_between(f, f->sinks_at, (int64_t)f->kv_heads * f->share, width)) return 0;
  int64_t left = f->num_tokens; /* no token is in two spans */
  for (long i = 0; i < f->num_spans; i++) {
    const span s = span_at(spans, i);
    left -= s.num_tokens;
    if (s.num_tokens <= 0 || left < 0 || !is_in_slot(f, &s)) return 0;
    if (s.first_token < 0 || s.first_token > f->num_tokens - s.num_tokens) return 0;
  }
  return 1;
}
