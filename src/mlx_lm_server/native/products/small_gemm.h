/* Products with few rows. Rows of A and C are `lda` and `ldc` floats apart. B is `[n, k]` where
 * `b_is_rows`, else `[k, n]`, its rows `ldb` numbers apart. 0 where the matrices do not suit. */
#pragma once
#pragma GCC visibility push(hidden)

/* What B consists of: floats, or whole numbers of 8 or 4 bits, the low half of a byte first. */
enum { FLOATS, BYTES, NIBBLES };

int small_product(int b_is_rows, int m, int n, int k, const float *a, int lda, const float *b,
                  int ldb, float *c, int ldc);

/* The same with codes, `format` says which. */
int codes_product(int format, int b_is_rows, int m, int n, int k, const float *a, int lda,
                  const void *b, int ldb, float *c, int ldc);

#pragma GCC visibility pop
