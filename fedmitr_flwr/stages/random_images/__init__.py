"""Random images that the ensemble labels or that inversion starts from, one module for each family."""
