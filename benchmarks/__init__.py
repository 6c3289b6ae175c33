"""Measurements: `python -m benchmarks.NAME [--quick] [--seed S] [--out FILE]`; results lie in results/."""
