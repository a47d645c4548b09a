from __future__ import annotations

from mlx_lm_server.server.engines.metrics import TTFT_BOUNDS, Histogram


def test_a_histogram_counts_what_is_at_most_its_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 99.0):
        histogram.observe(value)
    assert histogram.buckets() == [("1", 2.0), ("2", 3.0), ("+Inf", 4.0)]
    assert histogram.sum == 102.0
    assert list(TTFT_BOUNDS) == sorted(TTFT_BOUNDS)
