/* Vectors of floats as wide as the CPU has them: AVX-512, or AVX2 with FMA. */
#pragma once
#include <immintrin.h>

#if defined(__AVX512F__)
#define WIDTH 16
typedef __m512 vec;
#define vec_zero() _mm512_setzero_ps()
#define vec_load(p) _mm512_loadu_ps(p)
#define vec_store(p, v) _mm512_storeu_ps(p, v)
#define vec_fill(x) _mm512_set1_ps(x)
#define vec_add(a, b) _mm512_add_ps(a, b)
#define vec_sub(a, b) _mm512_sub_ps(a, b)
#define vec_mul(a, b) _mm512_mul_ps(a, b)
#define vec_div(a, b) _mm512_div_ps(a, b)
#define vec_max(a, b) _mm512_max_ps(a, b)
#define vec_fma(a, b, c) _mm512_fmadd_ps(a, b, c)
#define vec_unless_less(x, bound, v) \
  _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, bound, _CMP_GE_OQ), v)
#define vec_times_power(v, n)                                   \
  _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v), \
                                       _mm512_slli_epi32(_mm512_castps_si512(n), 23)))
#define vec_of_bytes(x) _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(x))
#define load_bytes(p) _mm_loadu_si128((const __m128i *)(p))
#define load_half_bytes(p) _mm_loadl_epi64((const __m128i *)(p))
/* The wider steps of `transpose`: of four numbers each, every second one of a, then of b. */
#define vec_even_quarters(a, b) _mm512_shuffle_f32x4(a, b, 0x88)
#define vec_odd_quarters(a, b) _mm512_shuffle_f32x4(a, b, 0xdd)
#define vec_unpack_low(a, b) _mm512_unpacklo_ps(a, b)
#define vec_unpack_high(a, b) _mm512_unpackhi_ps(a, b)
#define vec_low_pairs(a, b) _mm512_shuffle_ps(a, b, 0x44)
#define vec_high_pairs(a, b) _mm512_shuffle_ps(a, b, 0xee)
static inline __m128 fold(vec v) {
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v),
                              _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#elif defined(__AVX2__) && defined(__FMA__)
#define WIDTH 8
typedef __m256 vec;
#define vec_zero() _mm256_setzero_ps()
#define vec_load(p) _mm256_loadu_ps(p)
#define vec_store(p, v) _mm256_storeu_ps(p, v)
#define vec_fill(x) _mm256_set1_ps(x)
#define vec_add(a, b) _mm256_add_ps(a, b)
#define vec_sub(a, b) _mm256_sub_ps(a, b)
#define vec_mul(a, b) _mm256_mul_ps(a, b)
#define vec_div(a, b) _mm256_div_ps(a, b)
#define vec_max(a, b) _mm256_max_ps(a, b)
#define vec_fma(a, b, c) _mm256_fmadd_ps(a, b, c)
#define vec_unless_less(x, bound, v) _mm256_and_ps(_mm256_cmp_ps(x, bound, _CMP_GE_OQ), v)
#define vec_times_power(v, n)                                   \
  _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), \
                                       _mm256_slli_epi32(_mm256_castps_si256(n), 23)))
#define vec_of_bytes(x) _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x))
#define load_bytes(p) _mm_loadl_epi64((const __m128i *)(p))
#define load_half_bytes(p) _mm_loadu_si32(p)
#define vec_even_quarters(a, b) _mm256_permute2f128_ps(a, b, 0x20)
#define vec_odd_quarters(a, b) _mm256_permute2f128_ps(a, b, 0x31)
#define vec_unpack_low(a, b) _mm256_unpacklo_ps(a, b)
#define vec_unpack_high(a, b) _mm256_unpackhi_ps(a, b)
#define vec_low_pairs(a, b) _mm256_shuffle_ps(a, b, 0x44)
#define vec_high_pairs(a, b) _mm256_shuffle_ps(a, b, 0xee)
static inline __m128 fold(vec v) {
  return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}
#else
#error "needs AVX2 and FMA, or AVX-512"
#endif

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
/* The sums live in registers only if the loops over them vanish. */
#define UNROLL _Pragma("GCC unroll 8")

/* Rows become columns, in squares of four; then the squares change places. */
INLINE void transpose(vec rows[WIDTH]) {
  vec t[WIDTH];
  for (int i = 0; i < WIDTH; i += 4) {
    vec a = vec_unpack_low(rows[i], rows[i + 1]), b = vec_unpack_high(rows[i], rows[i + 1]);
    vec c = vec_unpack_low(rows[i + 2], rows[i + 3]), d = vec_unpack_high(rows[i + 2], rows[i + 3]);
    t[i] = vec_low_pairs(a, c), t[i + 1] = vec_high_pairs(a, c);
    t[i + 2] = vec_low_pairs(b, d), t[i + 3] = vec_high_pairs(b, d);
  }
#if WIDTH == 16
  vec u[WIDTH];
  for (int i = 0; i < 4; i++) {
    u[i] = vec_even_quarters(t[i], t[i + 4]), u[i + 4] = vec_odd_quarters(t[i], t[i + 4]);
    u[i + 8] = vec_even_quarters(t[i + 8], t[i + 12]), u[i + 12] = vec_odd_quarters(t[i + 8], t[i + 12]);
  }
  for (int i = 0; i < 4; i++) {
    rows[i] = vec_even_quarters(u[i], u[i + 8]), rows[i + 8] = vec_odd_quarters(u[i], u[i + 8]);
    rows[i + 4] = vec_even_quarters(u[i + 4], u[i + 12]);
    rows[i + 12] = vec_odd_quarters(u[i + 4], u[i + 12]);
  }
#else
  for (int i = 0; i < 4; i++) {
    rows[i] = vec_even_quarters(t[i], t[i + 4]);
    rows[i + 4] = vec_odd_quarters(t[i], t[i + 4]);
  }
#endif
}

INLINE void fetch(const float *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }

/* exp of this and of less is 0: a product with a number that small may be a denormal one, which costs a
 * hundred cycles, and beside the weight of 1 that some other has it vanishes. */
#define LOWEST_EXPONENT -60.0f

/* exp of x <= 0, to 3e-7; after Cody & Waite 1980 with the terms of Cephes expf. */
INLINE vec exp_of(vec x) {
  const float round = 12582912.0f; /* 1.5 * 2^23: what is added to it loses its fraction */
  vec shifted = vec_fma(x, vec_fill(1.44269504f), vec_fill(round));
  vec whole = vec_sub(shifted, vec_fill(round));
  vec rest = vec_fma(whole, vec_fill(-0.693359375f), x);
  rest = vec_fma(whole, vec_fill(2.12194440e-4f), rest);
  vec series = vec_fill(1.9875691500e-4f);
  series = vec_fma(series, rest, vec_fill(1.3981999507e-3f));
  series = vec_fma(series, rest, vec_fill(8.3334519073e-3f));
  series = vec_fma(series, rest, vec_fill(4.1665795894e-2f));
  series = vec_fma(series, rest, vec_fill(1.6666665459e-1f));
  series = vec_fma(series, rest, vec_fill(5.0000001201e-1f));
  vec power = vec_add(vec_fma(vec_mul(series, rest), rest, rest), vec_fill(1.0f));
  return vec_unless_less(x, vec_fill(LOWEST_EXPONENT), vec_times_power(power, shifted));
}
