/* What a single token sees, bit by bit as attention.c computes it for many.
 *
 * There a row takes a lane, and the one or two heads of a token that share K and V would leave most
 * lanes empty. Here keys lie across vectors for the scores, and the numbers of a value for the sums:
 *
 *     scores[head][key]  = sum_d  keys[key][d]  * queries[head][d]      keys are transposed on the way
 *     sums[head][d]      = sum_t  values[t][d]  * weights[head][t]
 *
 * Each number is summed up in the same order as there, so that a token is the same alone and in a
 * chunk.
 */
#include "token_attention.h"

#include <math.h>

enum { VALUE_VECS = 4 };

int can_walk(int num, long key_dim, long value_dim) {
  return num <= MAX_HEADS && key_dim % WIDTH == 0 && value_dim % WIDTH == 0;
}

/* Of up to WIDTH keys; those beyond the last repeat it. */
INLINE void score(const heads *h, int num, const float *keys, long left, float *scores) {
  vec sums[MAX_HEADS];
  UNROLL
  for (int j = 0; j < num; j++) sums[j] = vec_zero();
  for (long d = 0; d < h->key_dim; d += WIDTH) {
    vec square[WIDTH];
    for (long i = 0; i < WIDTH; i++) {
      const float *key = keys + MIN(i, left - 1) * h->key_dim + d;
      square[i] = vec_load(key);
      fetch(key + TILE_KEYS * h->key_dim);
    }
    transpose(square);
    UNROLL
    for (int i = 0; i < WIDTH; i++)
      UNROLL
      for (int j = 0; j < num; j++)
        sums[j] = vec_fma(square[i], vec_fill(h->queries[j * h->key_dim + d + i]), sums[j]);
  }
  UNROLL
  for (int j = 0; j < num; j++) vec_store(scores + j * TILE_KEYS, sums[j]);
}

/* Scores become weights; gives what all that was summed up before must be multiplied by. */
INLINE float weigh(heads *h, int j, int num) {
  float *scores = h->scores + j * TILE_KEYS, lanes[WIDTH];
  const float before = h->top[j];
  vec most = vec_fill(before);
  for (int t = num; t % WIDTH; t++) scores[t] = UNSEEN;
  for (int t = 0; t < num; t += WIDTH) most = vec_max(most, vec_load(scores + t));
  vec_store(lanes, most);
  for (int i = 0; i < WIDTH; i++) h->top[j] = MAX(h->top[j], lanes[i]);
  for (int t = 0; t < num; t += WIDTH)
    vec_store(scores + t, exp_of(vec_sub(vec_load(scores + t), vec_fill(h->top[j]))));
  vec_store(lanes, exp_of(vec_fill(before - h->top[j])));
  return lanes[0];
}

/* Weights t, t + 4, t + 8, … each in a sum of their own, as there. */
INLINE float sum_of(const float *weights, int num) {
  __m128 sums = _mm_setzero_ps();
  for (int t = 0; t < num; t += CHAINS) sums = _mm_add_ps(sums, _mm_loadu_ps(weights + t));
  sums = _mm_hadd_ps(sums, sums);
  return _mm_cvtss_f32(_mm_hadd_ps(sums, sums));
}

/* So many vectors of each head's sums, from number `at` on. */
INLINE void add_values(const heads *h, int num_heads, int vecs, const float *values, int num, long at,
                       const float *factor) {
  vec sums[MAX_HEADS][VALUE_VECS];
  UNROLL
  for (int j = 0; j < num_heads; j++)
    UNROLL
    for (int v = 0; v < vecs; v++) sums[j][v] = vec_zero();
  for (int t = 0; t < num; t++) {
    const float *value = values + t * h->value_dim + at;
    vec part[VALUE_VECS];
    UNROLL
    for (int v = 0; v < vecs; v++) {
      part[v] = vec_load(value + v * WIDTH);
      fetch(value + v * WIDTH + TILE_KEYS * h->value_dim);
    }
    UNROLL
    for (int j = 0; j < num_heads; j++) {
      vec weight = vec_fill(h->scores[j * TILE_KEYS + t]);
      UNROLL
      for (int v = 0; v < vecs; v++) sums[j][v] = vec_fma(part[v], weight, sums[j][v]);
    }
  }
  UNROLL
  for (int j = 0; j < num_heads; j++)
    UNROLL
    for (int v = 0; v < vecs; v++) {
      float *place = h->sums + j * h->value_dim + at + v * WIDTH;
      vec_store(place, vec_fma(vec_load(place), vec_fill(factor[j]), sums[j][v]));
    }
}

INLINE void walk(heads *h, int num_heads, const float *keys, const float *values, long first, long end) {
  const int step = num_heads > WIDTH / 4 ? 2 : VALUE_VECS; /* sums and values fit the registers */
  for (long t = first / TILE_KEYS * TILE_KEYS; t < end; t += TILE_KEYS) {
    int num = MIN(TILE_KEYS, end - t);
    float factor[MAX_HEADS];
    for (int i = 0; i < num; i += WIDTH)
      score(h, num_heads, keys + (t + i) * h->key_dim, num - i, h->scores + i);
    for (int j = 0; j < num_heads; j++) {
      for (long i = t; i < first; i++) h->scores[j * TILE_KEYS + i - t] = UNSEEN;
      factor[j] = weigh(h, j, num);
      h->total[j] = fmaf(h->total[j], factor[j], sum_of(h->scores + j * TILE_KEYS, num));
    }
    long at = 0;
    for (; at + step * WIDTH <= h->value_dim; at += step * WIDTH)
      add_values(h, num_heads, step, values + t * h->value_dim, num, at, factor);
    for (; at < h->value_dim; at += WIDTH)
      add_values(h, num_heads, 1, values + t * h->value_dim, num, at, factor);
  }
}

void walk_heads(heads *h, const float *keys, const float *values, long first, long end) {
#define WALK(num) walk(h, num, keys, values, first, end)
  switch (h->num) {
    case 1: WALK(1); break;
    case 2: WALK(2); break;
    case 3: WALK(3); break;
    case 4: WALK(4); break;
#if WIDTH == 16
    case 5: WALK(5); break;
    case 6: WALK(6); break;
    case 7: WALK(7); break;
    case 8: WALK(8); break;
#endif
  }
}
