"""exp, log and SiLU from additions and multiplications, for MLX's CPU back end on x86.

There `mx.exp` calls the C library once per element (13 ns); these are plain arithmetic that the
compiler vectorises (about 2 ns fused by `mx.compile`, 5 ns without a C++ compiler at run time).
Relative errors stay below 3e-7.

The reductions are the classic ones (Cody & Waite 1980): exp(x) = 2^n · exp(r) with n whole and
|r| ≤ ln 2 / 2; log(x) = e·ln 2 + log(m) with m in [1/√2, √2).
"""

from __future__ import annotations

import mlx.core as mx

from mlx_lm_server.runner.bounded_compile import BoundedCompile

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
# Adding and subtracting 1.5 · 2^23 rounds a float32 to a whole number.
ROUND = 12582912.0
# ln 2 in two parts: whole multiples of the first are exact in float32.
LN_2_HIGH = 0.693359375
LN_2_LOW = -2.12194440e-4
# (exp(r) - 1 - r) / r² on [-ln 2 / 2, ln 2 / 2] (Cephes expf), highest power first.
EXP_TERMS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
# log(1 + t) / t on [1/√2 - 1, √2 - 1] (Cephes logf), highest power first.
LOG_TERMS = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
SQRT_HALF_BITS = 0x3F3504F3
# tanh(x) = x · P(x²) / Q(x²) up to where float32 says 1 (Eigen's ptanh), highest power first.
TANH_LIMIT = 7.90531110763549805
TANH_TERMS = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
TANH_DIVISOR = (
    1.19825839466702e-06,
    1.18534705686654e-04,
    2.26843463243900e-03,
    4.89352518554385e-03,
)
SWIGLU_BLOCK_TOKENS = 128


def _horner(terms: tuple[float, ...], x: mx.array) -> mx.array:
    total = x * terms[0] + terms[1]
    for term in terms[2:]:
        total = total * x + term
    return total


def arithmetic_exp(x: mx.array) -> mx.array:
    """exp of float32, with x held in [-87, 88]: also -inf gives about 1e-38."""
    x = mx.minimum(mx.maximum(x, -87.0), 88.0)
    whole = (x * LOG2_E + ROUND) - ROUND
    rest = (x - whole * LN_2_HIGH) - whole * LN_2_LOW
    power = (whole.astype(mx.int32) + 127) << 23
    return (_horner(EXP_TERMS, rest) * rest * rest + rest + 1.0) * power.view(mx.float32)


def arithmetic_log(x: mx.array) -> mx.array:
    """log of positive, normal float32."""
    bits = x.view(mx.int32) - SQRT_HALF_BITS
    exponent = (bits >> 23).astype(mx.float32)
    t = ((bits & 0x7FFFFF) + SQRT_HALF_BITS).view(mx.float32) - 1.0
    square = t * t
    series = _horner(LOG_TERMS, t) * t * square - 0.5 * square + t
    return series + exponent * LN_2


def arithmetic_sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x)) of float32, to 1e-7 of the whole range: (1 + tanh(x / 2)) / 2."""
    half = mx.minimum(mx.maximum(x * 0.5, -TANH_LIMIT), TANH_LIMIT)
    square = half * half
    return 0.5 + 0.5 * (half * _horner(TANH_TERMS, square) / _horner(TANH_DIVISOR, square))


_compiled_swiglu = BoundedCompile(lambda gate, x: gate * x * arithmetic_sigmoid(gate))


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """SiLU(gate) · x, for float32 `[tokens, …]`; stands in for mlx-lm's.

    Done in blocks of tokens, whose intermediate arrays stay in the CPU's cache.
    """
    num_tokens = gate.shape[0]
    if num_tokens <= SWIGLU_BLOCK_TOKENS:
        return _compiled_swiglu(gate, x)
    blocks = [
        _compiled_swiglu(gate[i : i + SWIGLU_BLOCK_TOKENS], x[i : i + SWIGLU_BLOCK_TOKENS])
        for i in range(0, num_tokens, SWIGLU_BLOCK_TOKENS)
    ]
    return mx.concatenate(blocks)
