/* A BLAS copies ("packs") both operands before it multiplies. That pays for square matrices; with
 * the few rows of a decode step it costs more than the product, whose limit is reading the weights
 * once. Here the large operand is read where it lies.
 *
 *   C[m, n] = sum_k A[m, k] * B[n, k]     "nt": x @ W.T, and queries @ keys.T
 *   C[m, n] = sum_k A[m, k] * B[k, n]     "nn": weights @ values, for narrow values
 *
 * B may also be quantised K and V: whole numbers of 8 or 4 bits, which become floats in registers, so
 * that a quarter or an eighth of the bytes is read.
 *
 * nt keeps a tile of TILE_ROWS x TILE_COLS sums in registers, each a vector along k, and walks B in
 * blocks that stay in the second-level cache while all tiles of rows pass over them. From
 * MIN_WIDE_ROWS on the rows lie across vectors instead: A is transposed first, numbers of B are
 * broadcast, and no sum runs across a vector; only rows that would leave half of a vector empty stay
 * as they are. Blocks of B are shared out to threads.
 */
#include "small_gemm.h"

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#include "threads.h"
#include "vectors.h"

enum { TILE_ROWS = WIDTH == 16 ? 8 : 4, TILE_COLS = 3 };
enum { WIDE_VECS = WIDTH == 16 ? 4 : 2, WIDE_SUMS = WIDTH == 16 ? 24 : 8, WIDE_BLOCK = 96 };
enum { MAX_WIDE_COLS = WIDTH == 16 ? 8 : 4 };
enum { FETCH_AHEAD = 128 };

enum { MAX_ROWS = 192, MAX_NN_ROWS = 16, MAX_NN_COLS = 256, NN_VECS = 4, NN_ROWS = 4 };
enum { MIN_ARRANGED_ROWS = 8, MIN_ARRANGED_COLS = 128, MIN_WIDE_ROWS = 9 };
enum { BLOCK_BYTES = 192 * 1024 };

/* ---- numbers of B */

INLINE const void *at(int format, const void *b, long index) {
  if (format == FLOATS) return (const float *)b + index;
  return (const uint8_t *)b + (format == BYTES ? index : index / 2);
}

INLINE vec load_b(int format, const void *b, long index) {
  const void *p = at(format, b, index);
  if (format == FLOATS) return vec_load(p);
  if (format == BYTES) return vec_of_bytes(load_bytes(p));
  /* The low half of a byte comes first: spread bytes to 16 bits, and the halves to bytes. */
  __m128i spread = _mm_cvtepu8_epi16(load_half_bytes(p));
  __m128i low = _mm_and_si128(spread, _mm_set1_epi16(0x000f));
  __m128i high = _mm_and_si128(_mm_slli_epi16(spread, 4), _mm_set1_epi16(0x0f00));
  return vec_of_bytes(_mm_or_si128(low, high));
}

/* ---- x @ W.T */

INLINE float sum_of(vec v) {
  __m128 quarter = fold(v);
  quarter = _mm_hadd_ps(quarter, quarter);
  return _mm_cvtss_f32(_mm_hadd_ps(quarter, quarter));
}

/* The sums of one row of tiles, for three columns together: fewer shuffles than one by one. */
INLINE void store_sums(const vec *sums, int cols, float *c) {
  if (cols == 3) {
    __m128 first = _mm_hadd_ps(fold(sums[0]), fold(sums[1]));
    __m128 third = fold(sums[2]);
    float out[4];
    _mm_storeu_ps(out, _mm_hadd_ps(first, _mm_hadd_ps(third, third)));
    c[0] = out[0], c[1] = out[1], c[2] = out[2];
    return;
  }
  for (int n = 0; n < cols; n++) c[n] = sum_of(sums[n]);
}

/* `ahead` is fetched into the cache meanwhile: as many columns as the tile has. */
INLINE void nt_tile(int format, int rows, int cols, long depth, const float *a, long lda,
                    const void *b, long ldb, const void *ahead, float *c, long ldc) {
  vec sums[TILE_ROWS][TILE_COLS];
  UNROLL
  for (int m = 0; m < rows; m++)
    UNROLL
    for (int n = 0; n < cols; n++) sums[m][n] = vec_zero();
  for (long k = 0; k < depth; k += WIDTH) {
    vec columns[TILE_COLS];
    UNROLL
    for (int n = 0; n < cols; n++) {
      columns[n] = load_b(format, b, n * ldb + k);
      _mm_prefetch((const char *)at(format, ahead, n * ldb + k), _MM_HINT_T0);
    }
    UNROLL
    for (int m = 0; m < rows; m++) {
      vec row = vec_load(a + m * lda + k);
      UNROLL
      for (int n = 0; n < cols; n++) sums[m][n] = vec_fma(row, columns[n], sums[m][n]);
    }
  }
  UNROLL
  for (int m = 0; m < rows; m++) store_sums(sums[m], cols, c + m * ldc);
}

/* One instance of the tile for each number of rows, so that its loops unroll. */
#define TILE_OF(rows)                                                                        \
  case rows:                                                                                 \
    if (cols == TILE_COLS)                                                                   \
      nt_tile(FLOATS, rows, TILE_COLS, depth, a, lda, b, ldb, ahead, c, ldc);                \
    else                                                                                     \
      for (int n = 0; n < cols; n++)                                                         \
        nt_tile(FLOATS, rows, 1, depth, a, lda, b + n * ldb, ldb, ahead, c + n, ldc);        \
    break;

static void nt_any_tile(int rows, int cols, long depth, const float *a, long lda, const float *b,
                        long ldb, const float *ahead, float *c, long ldc) {
  switch (rows) {
    TILE_OF(1)
    TILE_OF(2)
    TILE_OF(3)
    TILE_OF(4)
#if WIDTH == 16
    TILE_OF(5)
    TILE_OF(6)
    TILE_OF(7)
    TILE_OF(8)
#endif
  }
}

typedef struct {
  int rows, cols;
  long depth;
  const float *a, *b;
  long lda, ldb;
  float *c;
  long ldc;
  int wide_rows;       /* so many, the first ones, go through wide tiles */
  const float *packed; /* those */
  int block;           /* columns of C in one block */
  atomic_long next;    /* the next block that nobody has taken */
} product;

static long take_block(product *p) {
  return atomic_fetch_add_explicit(&p->next, 1, memory_order_relaxed) * p->block;
}

/* Of the rows behind the wide ones. The first tile of rows fetches the columns that it needs next;
 * the second one, which finds its own in the cache, fetches the thread's next block. */
static void nt_block(const product *p, long first, long following) {
  const long last = MIN(first + p->block, p->cols);
  for (int m = p->wide_rows; m < p->rows; m += TILE_ROWS)
    for (long n = first; n < last; n += TILE_COLS) {
      const float *b = p->b + n * p->ldb, *ahead = b;
      if (m == 0 && n + 2 * TILE_COLS <= last) ahead = b + TILE_COLS * p->ldb;
      if (m == TILE_ROWS && following + n - first + TILE_COLS <= p->cols)
        ahead = b + (following - first) * p->ldb;
      nt_any_tile(MIN(TILE_ROWS, p->rows - m), MIN(TILE_COLS, last - n), p->depth,
                  p->a + m * p->lda, p->lda, b, p->ldb, ahead, p->c + m * p->ldc + n, p->ldc);
    }
}

/* ---- the same with rows across vectors, once they fill one: no sum across a vector */

/* Rows go in groups of vectors, alike in size: this is the first's, of so many rows. */
static int group_vecs(int rows) {
  int vecs = (rows + WIDTH - 1) / WIDTH, groups = (vecs + WIDE_VECS - 1) / WIDE_VECS;
  return (vecs + groups - 1) / groups;
}

/* Lanes beyond the last row repeat it. */
static void pack_group(const product *p, int first, int vecs, float *packed) {
  for (int lane = 0; lane < vecs * WIDTH; lane += WIDTH)
    for (long k = 0; k < p->depth; k += WIDTH) {
      vec square[WIDTH];
      for (int i = 0; i < WIDTH; i++)
        square[i] = vec_load(p->a + MIN(first + lane + i, p->wide_rows - 1) * p->lda + k);
      transpose(square);
      for (int i = 0; i < WIDTH; i++) vec_store(packed + (k + i) * vecs * WIDTH + lane, square[i]);
    }
}

/* sums[column][row] of one group of rows, which is packed, [depth][vecs * WIDTH]. A line of each
 * column is fetched FETCH_AHEAD numbers before it is read, at last those of the next tile. */
INLINE void wide_tile(int vecs, int cols, long depth, const float *a, const float *b, long ldb,
                      float *out) {
  vec sums[MAX_WIDE_COLS][WIDE_VECS];
  UNROLL
  for (int n = 0; n < cols; n++)
    UNROLL
    for (int v = 0; v < vecs; v++) sums[n][v] = vec_zero();
  for (long k = 0; k < depth; k += WIDTH) {
    const float *ahead = b + k + FETCH_AHEAD;
    if (k + FETCH_AHEAD >= depth) ahead += cols * ldb - depth;
    UNROLL
    for (int n = 0; n < cols; n++) _mm_prefetch((const char *)(ahead + n * ldb), _MM_HINT_T0);
    for (long i = k; i < k + WIDTH; i++) {
      vec row[WIDE_VECS];
      UNROLL
      for (int v = 0; v < vecs; v++) row[v] = vec_load(a + (i * vecs + v) * WIDTH);
      UNROLL
      for (int n = 0; n < cols; n++) {
        vec weight = vec_fill(b[n * ldb + i]);
        UNROLL
        for (int v = 0; v < vecs; v++) sums[n][v] = vec_fma(weight, row[v], sums[n][v]);
      }
    }
  }
  UNROLL
  for (int n = 0; n < cols; n++)
    UNROLL
    for (int v = 0; v < vecs; v++) vec_store(out + (n * vecs + v) * WIDTH, sums[n][v]);
}

/* From [column][lane] to rows of C. */
static void store_columns(int vecs, int rows, int cols, const float *sums, float *c, long ldc) {
  for (int m = 0; m < rows; m += WIDTH)
    for (int n = 0; n < cols; n += WIDTH) {
      int width = MIN(WIDTH, cols - n), height = MIN(WIDTH, rows - m);
      vec square[WIDTH];
      for (int i = 0; i < WIDTH; i++)
        square[i] = vec_load(sums + MIN(n + i, cols - 1) * vecs * WIDTH + m);
      transpose(square);
      for (int i = 0; i < height; i++) {
        float *place = c + (m + i) * ldc + n, row[WIDTH];
        vec_store(width == WIDTH ? place : row, square[i]);
        if (width < WIDTH) memcpy(place, row, sizeof(float) * width);
      }
    }
}

INLINE void wide_columns(int vecs, int rows, int cols, long depth, const float *a, const float *b,
                         long ldb, float *c, long ldc) {
  float sums[WIDE_BLOCK * WIDE_VECS * WIDTH];
  const int step = MIN(WIDE_SUMS / vecs, MAX_WIDE_COLS);
  int n = 0;
  for (; n + step <= cols; n += step)
    wide_tile(vecs, step, depth, a, b + n * ldb, ldb, sums + n * vecs * WIDTH);
  for (; n < cols; n++) wide_tile(vecs, 1, depth, a, b + n * ldb, ldb, sums + n * vecs * WIDTH);
  store_columns(vecs, rows, cols, sums, c, ldc);
}

static void wide_block(const product *p, long first) {
  const long last = MIN(first + p->block, p->cols);
  for (long n = first; n < last; n += WIDE_BLOCK)
    for (int m = 0, vecs; m < p->wide_rows; m += vecs * WIDTH) {
      vecs = group_vecs(p->wide_rows - m);
      int rows = MIN(vecs * WIDTH, p->wide_rows - m), cols = MIN(WIDE_BLOCK, last - n);
      const float *a = p->packed + m * p->depth, *b = p->b + n * p->ldb;
      float *c = p->c + m * p->ldc + n;
      switch (vecs) {
        case 1: wide_columns(1, rows, cols, p->depth, a, b, p->ldb, c, p->ldc); break;
        case 2: wide_columns(2, rows, cols, p->depth, a, b, p->ldb, c, p->ldc); break;
#if WIDTH == 16
        case 3: wide_columns(3, rows, cols, p->depth, a, b, p->ldb, c, p->ldc); break;
        case 4: wide_columns(4, rows, cols, p->depth, a, b, p->ldb, c, p->ldc); break;
#endif
      }
    }
}

static void nt_blocks(void *work) {
  product *p = work;
  for (long first = take_block(p), following; first < p->cols; first = following) {
    following = take_block(p);
    if (p->wide_rows) wide_block(p, first);
    if (p->wide_rows < p->rows) nt_block(p, first, following);
  }
}

/* ---- weights @ values */

INLINE void nn_tile(int format, int rows, int vecs, long depth, const float *a, long lda,
                    const void *b, long ldb, float *c, long ldc) {
  vec sums[NN_ROWS][NN_VECS];
  UNROLL
  for (int m = 0; m < rows; m++)
    UNROLL
    for (int v = 0; v < vecs; v++) sums[m][v] = vec_zero();
  for (long k = 0; k < depth; k++) {
    vec columns[NN_VECS];
    UNROLL
    for (int v = 0; v < vecs; v++) columns[v] = load_b(format, b, k * ldb + v * WIDTH);
    UNROLL
    for (int m = 0; m < rows; m++) {
      vec weight = vec_fill(a[m * lda + k]);
      UNROLL
      for (int v = 0; v < vecs; v++) sums[m][v] = vec_fma(weight, columns[v], sums[m][v]);
    }
  }
  UNROLL
  for (int m = 0; m < rows; m++)
    UNROLL
    for (int v = 0; v < vecs; v++) vec_store(c + m * ldc + v * WIDTH, sums[m][v]);
}

INLINE void nn_product(int format, int rows, int cols, long depth, const float *a, long lda,
                       const void *b, long ldb, float *c, long ldc) {
  for (int m = 0; m < rows; m += NN_ROWS)
    for (int n = 0; n < cols;) {
      int vecs = MIN(NN_VECS, (cols - n) / WIDTH);
      const float *a_tile = a + m * lda;
      const void *b_tile = at(format, b, n);
      float *c_tile = c + m * ldc + n;
      int left = MIN(NN_ROWS, rows - m);
#define NN_TILE(left, vecs) \
  nn_tile(format, left, vecs, depth, a_tile, lda, b_tile, ldb, c_tile, ldc)
      if (vecs == NN_VECS && left == 4) NN_TILE(4, 4);
      else if (vecs == NN_VECS && left == 2) NN_TILE(2, 4);
      else if (vecs == NN_VECS && left == 1) NN_TILE(1, 4);
      else NN_TILE(left, vecs);
      n += vecs * WIDTH;
    }
}

/* ---- products with codes: of one head each, so they are too small to be shared out */

INLINE void nt_codes(int format, int rows, int cols, long depth, const float *a, long lda,
                     const void *b, long ldb, float *c, long ldc) {
  for (int m = 0; m < rows; m += 4)
    for (int n = 0; n < cols;) {
      int width = cols - n < TILE_COLS ? 1 : TILE_COLS, left = MIN(4, rows - m);
      const float *a_tile = a + m * lda;
      const void *b_tile = at(format, b, n * ldb);
      const void *ahead = n + 2 * TILE_COLS <= cols ? at(format, b_tile, TILE_COLS * ldb) : b_tile;
      float *c_tile = c + m * ldc + n;
#define NT_TILE(left, width) \
  nt_tile(format, left, width, depth, a_tile, lda, b_tile, ldb, ahead, c_tile, ldc)
      if (width == TILE_COLS && left == 4) NT_TILE(4, TILE_COLS);
      else if (width == TILE_COLS && left == 2) NT_TILE(2, TILE_COLS);
      else if (width == TILE_COLS && left == 1) NT_TILE(1, TILE_COLS);
      else if (width == TILE_COLS) NT_TILE(3, TILE_COLS);
      else NT_TILE(left, 1);
      n += width;
    }
}

int codes_product(int format, int b_is_rows, int m, int n, int k, const float *a, int lda,
                  const void *b, int ldb, float *c, int ldc) {
  if ((b_is_rows ? k : n) % WIDTH || (format == NIBBLES && ldb % 2)) return 0;
  if (b_is_rows && format == BYTES) nt_codes(BYTES, m, n, k, a, lda, b, ldb, c, ldc);
  else if (b_is_rows) nt_codes(NIBBLES, m, n, k, a, lda, b, ldb, c, ldc);
  else if (format == BYTES) nn_product(BYTES, m, n, k, a, lda, b, ldb, c, ldc);
  else nn_product(NIBBLES, m, n, k, a, lda, b, ldb, c, ldc);
  return 1;
}

/* ---- products with floats */

static int block_columns(int cols, long depth) {
  long fitting = BLOCK_BYTES / (depth * (long)sizeof(float));
  long share = cols / (4 * num_threads()); /* a few blocks for each thread */
  long unit = TILE_COLS * WIDTH, block = MIN(fitting, share) / unit * unit;
  return block < unit ? unit : (int)block;
}

static int num_wide_rows(int rows) {
  int rest = rows % WIDTH;
  if (rows < MIN_WIDE_ROWS) return 0;
  return 2 * rest <= WIDTH ? rows - rest : rows;
}

/* The wide rows become groups, each [depth][lanes]. The others are copied, so that they start at a
 * cache line: a vector that lies across two costs two loads. */
static void arrange_rows(product *p) {
  const int wide_rows = num_wide_rows(p->rows), rest = p->rows - wide_rows;
  const long packed_rows = (wide_rows + WIDTH - 1) / WIDTH * WIDTH;
  float *packed = scratch((size_t)(packed_rows + rest) * p->depth);
  if (!packed) return;
  p->wide_rows = wide_rows;
  p->packed = packed;
  for (int m = 0, vecs; m < wide_rows; m += vecs * WIDTH) {
    vecs = group_vecs(wide_rows - m);
    pack_group(p, m, vecs, packed + m * p->depth);
  }
  float *copy = packed + (packed_rows - wide_rows) * p->depth; /* row m at m * depth */
  for (long m = wide_rows; m < p->rows; m++)
    memcpy(copy + m * p->depth, p->a + m * p->lda, sizeof(float) * p->depth);
  p->a = copy;
  p->lda = p->depth;
}

int small_product(int b_is_rows, int m, int n, int k, const float *a, int lda, const float *b,
                  int ldb, float *c, int ldc) {
  if (b_is_rows && m <= MAX_ROWS && k % WIDTH == 0) {
    product p = {m, n, k, a, b, lda, ldb, c, ldc, .block = block_columns(n, k)};
    if (m >= MIN_ARRANGED_ROWS && n >= MIN_ARRANGED_COLS) arrange_rows(&p);
    if ((double)m * n * k < MIN_SHARED_WORK) nt_blocks(&p);
    else share_out(nt_blocks, &p);
  } else if (!b_is_rows && m <= MAX_NN_ROWS && n <= MAX_NN_COLS && n % WIDTH == 0) {
    nn_product(FLOATS, m, n, k, a, lda, b, ldb, c, ldc);
  } else {
    return 0;
  }
  return 1;
}
