"""Speed and accuracy benchmarks, each one command; results are kept with their hardware."""
