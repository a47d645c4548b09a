#include "rows.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "threads.h"
#include "vectors.h"

void rms_norm(const float *x, long num_rows, long dim, float epsilon, float *out) {
  for (; num_rows > 0; num_rows--, x += dim, out += dim) {
    vec squares[4] = {vec_zero(), vec_zero(), vec_zero(), vec_zero()};
    long i = 0;
    for (; i + 4 * WIDTH <= dim; i += 4 * WIDTH)
      UNROLL
      for (int j = 0; j < 4; j++) {
        vec v = vec_load(x + i + j * WIDTH);
        squares[j] = vec_fma(v, v, squares[j]);
      }
    float lanes[WIDTH], sum = 0;
    vec_store(lanes, vec_add(vec_add(squares[0], squares[1]), vec_add(squares[2], squares[3])));
    for (int j = 0; j < WIDTH; j++) sum += lanes[j];
    for (; i < dim; i++) sum += x[i] * x[i];
    float scale = 1.0f / sqrtf(sum / dim + epsilon);
    for (i = 0; i < dim; i++) out[i] *= x[i] * scale;
  }
}

int rotate(const float *x, long num_rows, long dim, const float *packed, float *out) {
  if (!(packed[0] >= 0 && packed[0] <= dim)) return 0;
  const long half = (long)packed[0] / 2;
  if (packed[0] != 2 * half) return 0;
  const float *cosines = packed + 1, *sines = cosines + half;
  for (; num_rows > 0; num_rows--, x += dim, out += dim) {
    for (long i = 0; i < half; i++) {
      out[i] = x[i] * cosines[i] - x[i + half] * sines[i];
      out[i + half] = x[i] * sines[i] + x[i + half] * cosines[i];
    }
    memcpy(out + 2 * half, x + 2 * half, sizeof(float) * (dim - 2 * half));
  }
  return 1;
}

/* Neither exponential overflows: 1 / (1 + exp(-|g|)), times exp(-|g|) where g < 0. */
INLINE vec swiglu_of(vec gate, vec x) {
  vec power = exp_of(vec_sub(vec_zero(), vec_max(gate, vec_sub(vec_zero(), gate))));
  vec one = vec_fill(1.0f);
  vec above = vec_add(vec_unless_less(gate, vec_zero(), vec_sub(one, power)), power);
  return vec_mul(vec_mul(gate, x), vec_div(above, vec_add(one, power)));
}

enum { SWIGLU_BLOCK = 8192, FLOPS_OF_SWIGLU = 16 };

typedef struct {
  const float *x;
  float *out;
  long num_floats;
  atomic_long next; /* the first number that nobody has taken */
} swiglu_work;

static void swiglu_blocks(void *work) {
  swiglu_work *w = work;
  long begin;
  while ((begin = atomic_fetch_add(&w->next, SWIGLU_BLOCK)) < w->num_floats) {
    const long end = MIN(begin + SWIGLU_BLOCK, w->num_floats);
    long i = begin;
    for (; i + WIDTH <= end; i += WIDTH)
      vec_store(w->out + i, swiglu_of(vec_load(w->out + i), vec_load(w->x + i)));
    float gates[WIDTH] = {0}, factors[WIDTH] = {0};
    memcpy(gates, w->out + i, sizeof(float) * (end - i));
    memcpy(factors, w->x + i, sizeof(float) * (end - i));
    vec_store(gates, swiglu_of(vec_load(gates), vec_load(factors)));
    memcpy(w->out + i, gates, sizeof(float) * (end - i));
  }
}

void swiglu(const float *x, long num_floats, float *out) {
  swiglu_work work = {.x = x, .out = out, .num_floats = num_floats};
  if (num_floats * FLOPS_OF_SWIGLU < MIN_SHARED_WORK) swiglu_blocks(&work);
  else share_out(swiglu_blocks, &work);
}
