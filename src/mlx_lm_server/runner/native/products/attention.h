/* Attention of a chunk of new tokens, for one head of K and V. */
#pragma once
#pragma GCC visibility push(hidden)

/* `packed` holds, float by float: a `chunk_head`; with sinks one logit for each query head; the
 * queries `[share, num_queries, key_dim]`. `values` and the keys have `num_keys` rows, of which query
 * i sees those up to `start + i`. Writes `[share, num_queries, value_dim]` to `out`. */
void attend(const float *packed, const float *values, long num_keys, long value_dim, float *out);

/* 0 where its tiles do not fit. */
int can_attend(const float *packed, long value_dim);

#pragma GCC visibility pop
