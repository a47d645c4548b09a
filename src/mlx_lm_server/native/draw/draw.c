/* Draws a token for each row of logits: what runner/sampling/race.py does with arrays, in one pass per row
 * while the row lies in the cache, and with as many rounds of the race as it takes.
 *
 * Every loop runs over the vocabulary without a branch, in LANES independent lanes where it sums up
 * or looks for the largest, so that the compiler vectorises it. It needs no instruction by name.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 64, MAX_ROUNDS = 64 };

/* Of one row, in this order; the caller has the same (runner/backends/x86/native_draw.py). `inverse_temperature` 0 is
 * greedy; `top_k` 0, `min_p` 0 and `top_p` 1 keep all. */
#define DRAW_PARAMS(REAL, WHOLE, BITS) \
  REAL(inverse_temperature) REAL(min_p) REAL(top_p) WHOLE(top_k) BITS(key_a) BITS(key_b)

#define REAL_FIELD(name) float name;
#define WHOLE_FIELD(name) int32_t name;
#define BITS_FIELD(name) uint32_t name;

typedef struct {
  DRAW_PARAMS(REAL_FIELD, WHOLE_FIELD, BITS_FIELD)
} draw_params;

/* Names and kinds, the latter as Python's struct calls them; a caller that has others must not call. */
#define REAL_NAME(name) #name ":f "
#define WHOLE_NAME(name) #name ":i "
#define BITS_NAME(name) #name ":I "
const char *const draw_fields = DRAW_PARAMS(REAL_NAME, WHOLE_NAME, BITS_NAME);

/* ---- passes over a row */

static float largest(const float *x, int n) {
  float lanes[LANES];
  for (int j = 0; j < LANES; j++) lanes[j] = -INFINITY;
  int i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int j = 0; j < LANES; j++) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  for (int j = 0; i + j < n; j++) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  float most = lanes[0];
  for (int j = 1; j < LANES; j++) most = lanes[j] > most ? lanes[j] : most;
  return most;
}

/* The first place that holds the largest value. */
static int place_of_largest(const float *x, int n) {
  float most = largest(x, n);
  for (int i = 0; i < n; i++)
    if (x[i] == most) return i;
  return 0; /* nothing but NaN */
}

/* The sum of the weights that are larger than `bar`. */
static float mass_above(const float *weights, int n, float bar) {
  float lanes[LANES] = {0};
  int i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int j = 0; j < LANES; j++) lanes[j] += weights[i + j] > bar ? weights[i + j] : 0.0f;
  for (int j = 0; i + j < n; j++) lanes[j] += weights[i + j] > bar ? weights[i + j] : 0.0f;
  for (int half = LANES / 2; half; half /= 2)
    for (int j = 0; j < half; j++) lanes[j] += lanes[j + half];
  return lanes[0];
}

static void keep_above(float *values, const float *weights, int n, float bar) {
  for (int i = 0; i < n; i++) values[i] = weights[i] > bar ? values[i] : 0.0f;
}

static void keep_from(float *weights, int n, float floor) {
  for (int i = 0; i < n; i++) weights[i] = weights[i] >= floor ? weights[i] : 0.0f;
}

/* The k-th largest of n values, by quickselect; they change places. */
static float kth_largest(float *x, int n, int k) {
  int low = 0, high = n - 1, place = k - 1;
  while (low < high) {
    float pivot = x[low + (high - low) / 2];
    int i = low, j = high;
    while (i <= j) {
      while (x[i] > pivot) i++;
      while (x[j] < pivot) j--;
      if (i > j) break;
      float swapped = x[i];
      x[i++] = x[j];
      x[j--] = swapped;
    }
    if (place <= j) high = j;
    else if (place >= i) low = i;
    else break;
  }
  return x[place];
}

/* ---- exp, log and noise: the arithmetic of runner/backends/x86/fast_math.py */

static inline float exp_of(float x) {
  x = x > -87.0f ? x : -87.0f;
  float shifted = x * 1.4426950408889634f + 12582912.0f, whole = shifted - 12582912.0f;
  float r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  int32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  uint32_t power = (uint32_t)(bits + 127) << 23;
  float scale;
  memcpy(&scale, &power, sizeof scale);
  return (p * r * r + r + 1.0f) * scale;
}

static inline float log_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits -= 0x3F3504F3;
  float exponent = (float)(bits >> 23);
  bits = (bits & 0x7FFFFF) + 0x3F3504F3;
  float t;
  memcpy(&t, &bits, sizeof t);
  t -= 1.0f;
  float square = t * t, p = 7.0376836292e-2f;
  p = p * t + -1.1514610310e-1f;
  p = p * t + 1.1676998740e-1f;
  p = p * t + -1.2420140846e-1f;
  p = p * t + 1.4249322787e-1f;
  p = p * t + -1.6668057665e-1f;
  p = p * t + 2.0000714765e-1f;
  p = p * t + -2.4999993993e-1f;
  p = p * t + 3.3333331174e-1f;
  return p * t * square - 0.5f * square + t + exponent * 0.69314718055994531f;
}

static void weigh(const float *logits, float *weights, int n, float top, float scale) {
  for (int i = 0; i < n; i++) weights[i] = exp_of((logits[i] - top) * scale);
}

static void run_race(const float *weights, float *race, int n, uint32_t key_a, uint32_t key_b) {
  for (int i = 0; i < n; i++) {
    uint32_t h = (uint32_t)i * 0x9E3779B1u + key_a;
    h = (h ^ (h >> 16)) * 0x85EBCA6Bu + key_b;
    h = (h ^ (h >> 13)) * 0xC2B2AE35u;
    h ^= h >> 16;
    float uniform = ((float)(int32_t)(h >> 9) + 0.5f) * 0x1p-23f;
    race[i] = weights[i] / -log_of(uniform);
  }
}

/* ---- a row */

static int draw(const float *logits, int n, const draw_params *params, float *weights, float *race) {
  if (params->inverse_temperature == 0.0f) return place_of_largest(logits, n);
  weigh(logits, weights, n, largest(logits, n), params->inverse_temperature);
  if (params->min_p > 0.0f) keep_from(weights, n, params->min_p);
  if (params->top_k > 0 && params->top_k < n) {
    memcpy(race, weights, sizeof(float) * n);
    keep_from(weights, n, kth_largest(race, n, params->top_k));
  }
  run_race(weights, race, n, params->key_a, params->key_b);
  int winner = place_of_largest(race, n);
  if (params->top_p >= 1.0f) return winner;
  float limit = params->top_p * mass_above(weights, n, 0.0f);
  for (int round = 0; round < MAX_ROUNDS; round++) {
    if (mass_above(weights, n, weights[winner]) < limit) return winner;
    keep_above(race, weights, n, weights[winner]);
    winner = place_of_largest(race, n);
  }
  return place_of_largest(weights, n);
}

/* `scratch` has room for two rows. 0, and nothing is touched, where there is no vocabulary or no array. */
int draw_rows(int num_rows, int vocab_size, const float *logits, const draw_params *params,
              float *scratch, int32_t *tokens) {
  if (num_rows < 0 || vocab_size <= 0 || !logits || !params || !scratch || !tokens) return 0;
  for (int row = 0; row < num_rows; row++)
    tokens[row] = draw(logits + (size_t)row * vocab_size, vocab_size, &params[row], scratch,
                       scratch + vocab_size);
  return 1;
}
