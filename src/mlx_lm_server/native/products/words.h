/* What the caller and this folder mean by some numbers. The caller reads them here (native.numbers_in):
 * a name, and a number or several in braces. */
#pragma once

/* What is meant by `alpha`: a few numbers that no product has.
 *
 * Rows times codes: m, n, k and ldb count numbers, the result is not scaled. */
#define NIBBLES_ALPHA 0x1p-104f
#define BYTES_ALPHA 0x1p-108f
/* Rows, and a square matrix that is none: for a rotation it is what rows.h calls `packed`, for the
 * others nothing. */
#define SWIGLU_ALPHA 0x1p-112f
#define RMS_NORM_ALPHA 0x1p-120f /* and up to twice that: the fraction is epsilon's upper bits */
#define ROTATION_ALPHA 0x1p-124f
/* Keys, values, and what attention.h calls `told`. */
#define ATTENTION_ALPHA 0x1p-116f

/* So many bits epsilon moves up, to fill the fraction. */
#define EPSILON_SHIFT 8
/* Columns of a matrix that only poses as one. */
#define POSING_DEPTH 8
/* What begins a matrix whose product with itself is not computed. The numbers are none. */
#define NOTHING {0x7fc16e6f, 0x7fc27468, 0x7fc3696e, 0x7fc46721}
