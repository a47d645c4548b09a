/* cblas_sgemm in front of a BLAS, for x86 CPUs with AVX2 or AVX-512.
 *
 * Products that small_gemm.c does faster go there, all others to the BLAS that `products_init` names.
 * The interface of a BLAS has no word for what the rest of this folder does. The caller says it by
 * `alpha`, one of a few numbers that no product has (runner/native_products.py), and then A, B and C
 * are what the function takes. What does not fit it gives NaN.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "rows.h"
#include "small_gemm.h"
#include "threads.h"

/* Rows times codes: m, n, k and ldb count numbers, the result is not scaled. */
#define NIBBLES_ALPHA 0x1p-104f
#define BYTES_ALPHA 0x1p-108f
/* Keys, values, and what attention.h calls `told`. */
#define ATTENTION_ALPHA 0x1p-116f
/* Rows, and a square matrix that is none: for a rotation it is what rows.h calls `packed`, for the
 * others nothing. */
#define SWIGLU_ALPHA 0x1p-112f
#define RMS_NORM_ALPHA 0x1p-120f /* and up to twice that: the fraction is epsilon's upper bits */
#define ROTATION_ALPHA 0x1p-124f

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };

typedef void (*sgemm)(int, int, int, int, int, int, float, const float *, int, const float *, int,
                      float, float *, int);

static sgemm full_sgemm;

static float epsilon_in(float alpha) {
  uint32_t bits;
  memcpy(&bits, &alpha, sizeof bits);
  bits <<= 8; /* 23 bits of fraction become the upper ones of a number without a sign */
  bits &= 0x7fffffff;
  memcpy(&alpha, &bits, sizeof bits);
  return alpha;
}

/* Rows that lie as columns, as rows; NULL without memory for them. */
static float *transposed(int m, int k, const float *a, int lda) {
  float *rows = malloc(sizeof(float) * m * k);
  for (long i = 0; rows && i < m; i++)
    for (long j = 0; j < k; j++) rows[i * k + j] = a[j * lda + i];
  return rows;
}

static int is_by_row(float alpha) {
  const int is_norm = alpha >= RMS_NORM_ALPHA && alpha < 2 * RMS_NORM_ALPHA;
  return is_norm || alpha == ROTATION_ALPHA || alpha == SWIGLU_ALPHA;
}

/* Whether it could be done. */
static int by_row(int trans_a, int m, int k, float alpha, const float *a, int lda, const float *b,
                  float *c) {
  float *rows = trans_a == TRANS ? transposed(m, k, a, lda) : NULL;
  const float *x = rows ? rows : a;
  if (trans_a == TRANS ? !rows : lda != k) return 0;
  if (alpha == ROTATION_ALPHA) rotate(x, m, k, b, c);
  else if (alpha == SWIGLU_ALPHA) swiglu(x, (long)m * k, c);
  else rms_norm(x, m, k, epsilon_in(alpha), c);
  free(rows);
  return 1;
}

/* What begins a matrix whose product with itself is not computed: its memory stays as it was, for those
 * who write it later. The numbers are none. */
static int is_nothing(int k, const float *a, const float *b) {
  static const uint32_t nothing[4] = {0x7fc16e6f, 0x7fc27468, 0x7fc3696e, 0x7fc46721};
  return k == 8 && a == b && memcmp(a, nothing, sizeof nothing) == 0;
}

static int special(int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a,
                   int lda, const float *b, int ldb, float *c, int ldc) {
  const int b_is_rows = trans_b == TRANS;
  if (k == 0) return 0;
  if (is_by_row(alpha))
    return !b_is_rows && k == n && ldb == n && ldc == n && by_row(trans_a, m, k, alpha, a, lda, b, c);
  if (trans_a == TRANS) return 0;
  if (alpha == BYTES_ALPHA || alpha == NIBBLES_ALPHA) {
    int format = alpha == BYTES_ALPHA ? BYTES : NIBBLES;
    return codes_product(format, b_is_rows, m, n, k, a, lda, b, ldb, c, ldc);
  }
  if (alpha != ATTENTION_ALPHA || ldc != n) return 0;
  attend((float *)a, (float *)b, n, c);
  return 1;
}

void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                 const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc) {
  const int is_special = alpha >= ROTATION_ALPHA && alpha <= NIBBLES_ALPHA;
  const int is_plain = trans_a == NO_TRANS && alpha == 1.0f && beta == 0.0f && k > 0;
  if (order == ROW_MAJOR && is_special) {
    if (special(trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, c, ldc)) return;
    for (long i = 0; i < m; i++)
      for (long j = 0; j < n; j++) c[i * ldc + j] = NAN;
    return;
  }
  if (order == ROW_MAJOR && is_plain)
    if (is_nothing(k, a, b) || small_product(trans_b == TRANS, m, n, k, a, lda, b, ldb, c, ldc)) return;
  full_sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

/* `full` is the cblas_sgemm of a whole BLAS; `num_threads` counts the caller. Call once. */
void products_init(void *full, int num_threads, int spin_us) {
  full_sgemm = (sgemm)full;
  start_helpers(num_threads, spin_us);
}
