"""Benchmarks of speed and accuracy. Each is one command, and results are stored with their hardware."""
