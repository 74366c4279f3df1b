"""The K teachers as one function: ensemble, weights, trust, averages; `engine` runs them fast."""
