"""Scripts that print the numbers this project claims; `python -m benchmarks` lists and runs them."""
