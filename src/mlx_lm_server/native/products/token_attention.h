/* Attention of one token: the few query heads that share K and V. */
#pragma once
#include "vectors.h"

#pragma GCC visibility push(hidden)

enum { MAX_HEADS = WIDTH == 16 ? 8 : 4, TILE_KEYS = 64 };
/* Each maximum and each sum of weights waits for the one before, so there are so many of them. */
enum { CHAINS = 4 };
/* What a row has not seen; finite, so that it can be subtracted from itself. */
#define UNSEEN -1e30f

/* Heads on their way through the keys. `queries` are scaled, `[num][key_dim]`; `sums` `[num][value_dim]`
 * and `total` are of weights relative to exp(top). `scores` is room for `[num][TILE_KEYS]`. */
typedef struct {
  int num;
  long key_dim, value_dim;
  float *queries, *scores, *sums;
  float top[MAX_HEADS], total[MAX_HEADS];
} heads;

/* Whether heads of such dimensions can walk. */
int can_walk(int num, long key_dim, long value_dim);

/* Past the keys from `first` to `end`. */
void walk_heads(heads *h, const float *keys, const float *values, long first, long end);

#pragma GCC visibility pop
