"""What travels as a product reaches the library, and nothing else is taken for it."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_lm_server.runner.backends.x86 import native_products
from tests.back_ends import needs_native

pytestmark = needs_native


@pytest.mark.parametrize("shape", [(1, 1), (3, 4, 100, 64), (5, 7)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.uint32, mx.bfloat16])
def test_an_unwritten_array_is_written_as_any_other(
    shape: tuple[int, ...], dtype: mx.Dtype
) -> None:
    array = native_products.unwritten(shape, dtype)
    assert (array.shape, array.dtype) == (shape, dtype)
    array[:1] = 3
    array[1:] = 4
    expected = mx.full(shape, 4, dtype)
    expected[:1] = 3
    assert mx.array_equal(array, expected)


def test_an_unwritten_array_takes_no_pages() -> None:
    before, resident = mx.get_active_memory(), _resident_bytes()
    array = native_products.unwritten((1 << 14, 1 << 14), mx.float32)
    mx.eval(array)
    assert mx.get_active_memory() - before >= array.nbytes
    assert _resident_bytes() - resident < array.nbytes / 10


def test_a_matrix_times_itself_is_a_product() -> None:
    x = mx.random.normal((8, 8))
    assert mx.allclose(x @ x, (x[:, :, None] * x[None]).sum(axis=1), atol=1e-4)


def test_what_does_not_fit_is_no_number() -> None:
    x = mx.ones((3, 4))
    for alpha in (native_products.RMS_NORM_ALPHA, native_products.ROTATION_ALPHA):
        assert mx.isnan(native_products.run(x, x.T, alpha)).all()


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
