/* Attention of some of a batch's tokens. */
#pragma once
#pragma GCC visibility push(hidden)

/* `told` are `num_rows` of `width` floats. The first hold, number by number, what told.h calls facts and
 * their spans, and with sinks one logit for each query head; then come the queries, one row for each
 * token and head, which are overwritten by what these saw. `keys` and `values` are
 * `[slots, kv_heads, capacity, dim]`; where K and V of the tokens follow the queries, one row for each
 * token and KV head, they are written there first. 0, and nothing is touched, where that cannot be
 * true; 0 without memory to work in. */
int attend(float *keys, float *values, long num_rows, long width, float *told);

#pragma GCC visibility pop
