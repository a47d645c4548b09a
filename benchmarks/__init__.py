"""Scripts that print the numbers this project claims; `python -m benchmarks` runs them."""
