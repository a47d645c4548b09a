/* What is done to each row of a matrix, or each number, by itself. */
#pragma once
#pragma GCC visibility push(hidden)

/* Root mean square norm (Zhang & Sennrich 2019); every row of `out` holds the weights at first. */
void rms_norm(const float *x, long num_rows, long dim, float epsilon, float *out);

/* Rotary position embedding (Su et al. 2021) of one position: `packed` is how many numbers of a row
 * are rotated, the cosines of half as many angles, and their sines. The first half of these numbers
 * is paired with the second. 0 where a row has not so many, or they are no pairs. */
int rotate(const float *x, long num_rows, long dim, const float *packed, float *out);

/* SwiGLU (Shazeer 2020): `out`, which holds the gates at first, becomes SiLU(gate) * x. A number's
 * bits do not depend on where it stands. */
void swiglu(const float *x, long num_floats, float *out);

#pragma GCC visibility pop
