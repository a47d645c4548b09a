#include "rows.h"

#include <math.h>
#include <string.h>

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

void rotate(const float *x, long num_rows, long dim, const float *packed, float *out) {
  long half = (long)packed[0] / 2;
  const float *cosines = packed + 1, *sines = cosines + half;
  for (; num_rows > 0; num_rows--, x += dim, out += dim) {
    for (long i = 0; i < half; i++) {
      out[i] = x[i] * cosines[i] - x[i + half] * sines[i];
      out[i + half] = x[i] * sines[i] + x[i + half] * cosines[i];
    }
    memcpy(out + 2 * half, x + 2 * half, sizeof(float) * (dim - 2 * half));
  }
}
