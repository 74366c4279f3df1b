"""Benchmark the speed of sparse inversion: our engine against a plain reference with the same mathematics."""
