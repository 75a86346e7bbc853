"""Synthetic animals and recordings with known truth, and stand-ins for tests and benchmarks."""
