/* What attention is told, and whether it can be true. */
#pragma once
#include <stdint.h>
#include <string.h>

/* Common to all rows, in this order; the caller has the same names (Facts of span_attention.py). */
#define FACTS(WHOLE, REAL)                                                                    \
  WHOLE(num_spans)                                                                            \
  WHOLE(num_slots) WHOLE(kv_heads) WHOLE(capacity) WHOLE(key_dim) WHOLE(value_dim) /* K, V */ \
  WHOLE(share)         /* query heads for each KV head */                                     \
  WHOLE(window)        /* 0: none */                                                          \
  WHOLE(sinks_at)      /* the number of the first; 0: no sinks */                             \
  WHOLE(first_row)     /* where the queries begin */                                          \
  WHOLE(num_tokens)    /* of the queries */                                                   \
  WHOLE(has_new)       /* 1: their K and then V follow; 0: these are there already */         \
  REAL(scale)
/* Tokens side by side in the batch and in a slot; the first one comes after `start` tokens. */
#define SPAN(WHOLE) WHOLE(slot) WHOLE(first_token) WHOLE(num_tokens) WHOLE(start)

#define WHOLE_FIELD(name) int32_t name;
#define REAL_FIELD(name) float name;

typedef struct {
  FACTS(WHOLE_FIELD, REAL_FIELD)
} facts;

typedef struct {
  SPAN(WHOLE_FIELD)
} span;

enum { NUMBERS_OF_FACTS = sizeof(facts) / sizeof(float), NUMBERS_OF_SPAN = sizeof(span) / sizeof(float) };

/* Of those that lie one behind the other, among floats. */
static inline span span_at(const float *spans, long number) {
  span found;
  memcpy(&found, spans + number * NUMBERS_OF_SPAN, sizeof found);
  return found;
}

#pragma GCC visibility push(hidden)

/* Whether what is told in `num_rows` of `width` floats, with its spans behind the facts, fits in there,
 * and the spans fit the slots. Reads no further than the last row. */
int can_be_true(const facts *f, const float *spans, long num_rows, long width);

#pragma GCC visibility pop
