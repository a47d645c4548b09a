/* cblas_sgemm in front of a BLAS, for x86 CPUs with AVX2 or AVX-512.
 *
 * Products that small_gemm.c does faster go there, all others to the BLAS that `products_init` names.
 * The interface of a BLAS has no word for what the rest of this folder does. The caller says it by
 * `alpha`, one of a few numbers that no product has (words.h), and then A, B and C are what the function
 * takes. Whatever sizes the call has or is told are compared before anything is read: what does not fit
 * gives NaN, and nothing outside of the matrices, and of the slab that attention is told, is touched.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "rows.h"
#include "small_gemm.h"
#include "threads.h"
#include "words.h"

enum { ROW_MAJOR = 101, COLUMN_MAJOR = 102, NO_TRANS = 111, TRANS = 112 };

typedef void (*sgemm)(int, int, int, int, int, int, float, const float *, int, const float *, int,
                      float, float *, int);

static sgemm full_sgemm;

static float epsilon_in(float alpha) {
  uint32_t bits;
  memcpy(&bits, &alpha, sizeof bits);
  bits <<= EPSILON_SHIFT; /* 23 bits of fraction become the upper ones of a number without a sign */
  bits &= 0x7fffffff;
  memcpy(&alpha, &bits, sizeof bits);
  return alpha;
}

/* One with rows of C behind one another. */
typedef struct {
  int a_is_columns, b_is_rows; /* as they lie in memory */
  int m, n, k;
  float alpha;
  const float *a, *b;
  int lda, ldb;
  float *c;
  int ldc;
} call;

/* Whether a matrix can lie so, with rows of so many numbers. */
static int can_lie(const float *matrix, int row, int stride) { return matrix && row > 0 && stride >= row; }

static int can_be_read(const call *p) {
  return p->m > 0 && can_lie(p->a, p->a_is_columns ? p->m : p->k, p->lda) &&
         can_lie(p->b, p->b_is_rows ? p->k : p->n, p->ldb) && p->k > 0;
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
static int by_row(const call *p) {
  if (p->b_is_rows || p->k != p->n || p->ldb != p->n || p->ldc != p->n) return 0;
  if (!p->a_is_columns && p->lda != p->k) return 0;
  float *rows = p->a_is_columns ? transposed(p->m, p->k, p->a, p->lda) : NULL;
  const float *x = rows ? rows : p->a;
  if (p->a_is_columns && !rows) return 0;
  int is_done = 1;
  if (p->alpha == ROTATION_ALPHA) is_done = rotate(x, p->m, p->k, p->b, p->c);
  else if (p->alpha == SWIGLU_ALPHA) swiglu(x, (long)p->m * p->k, p->c);
  else rms_norm(x, p->m, p->k, epsilon_in(p->alpha), p->c);
  free(rows);
  return is_done;
}

/* Keys and values pose as such matrices. */
static int can_attend(const call *p) {
  return !p->a_is_columns && !p->b_is_rows && p->k == POSING_DEPTH && p->lda == POSING_DEPTH &&
         p->ldb == p->n && p->ldc == p->n;
}

/* Whether it could be done. */
static int special(const call *p) {
  if (is_by_row(p->alpha)) return by_row(p);
  if (p->alpha == ATTENTION_ALPHA)
    return can_attend(p) && attend((float *)p->a, (float *)p->b, p->m, p->n, p->c);
  if (p->a_is_columns || (p->alpha != BYTES_ALPHA && p->alpha != NIBBLES_ALPHA)) return 0;
  return codes_product(p->alpha == BYTES_ALPHA ? BYTES : NIBBLES, p->b_is_rows, p->m, p->n, p->k, p->a,
                       p->lda, p->b, p->ldb, p->c, p->ldc);
}

/* The memory of such a product stays as it was, for those who write it later. */
static int is_nothing(const call *p) {
  static const uint32_t nothing[] = NOTHING;
  return p->k == POSING_DEPTH && p->a == p->b && memcmp(p->a, nothing, sizeof nothing) == 0;
}

static int is_known(int trans) { return trans == NO_TRANS || trans == TRANS; }

static void fill_with_nan(long rows, long columns, float *c, int ldc) {
  for (long i = 0; i < rows; i++)
    for (long j = 0; j < columns; j++) c[i * ldc + j] = NAN;
}

void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                 const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc) {
  const call p = {trans_a == TRANS, trans_b == TRANS, m, n, k, alpha, a, b, lda, ldb, c, ldc};
  const int rows = order == ROW_MAJOR ? m : n, columns = order == ROW_MAJOR ? n : m;
  const int is_order = order == ROW_MAJOR || order == COLUMN_MAJOR;
  const int can_be_written = is_order && can_lie(c, columns, ldc);
  const int fits = order == ROW_MAJOR && is_known(trans_a) && is_known(trans_b) && can_be_written &&
                   can_be_read(&p);
  if (alpha >= ROTATION_ALPHA && alpha <= NIBBLES_ALPHA) {
    const int is_done = fits && special(&p);
    if (!is_done && can_be_written) fill_with_nan(rows, columns, c, ldc);
    return;
  }
  if (fits && trans_a == NO_TRANS && alpha == 1.0f && beta == 0.0f)
    if (is_nothing(&p) || small_product(p.b_is_rows, m, n, k, a, lda, b, ldb, c, ldc)) return;
  full_sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

/* `full` is the cblas_sgemm of a whole BLAS; `num_threads` counts the caller. Call once. */
void products_init(void *full, int num_threads, int spin_us) {
  full_sgemm = (sgemm)full;
  start_helpers(num_threads, spin_us);
}
