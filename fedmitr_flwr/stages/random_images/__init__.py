"""Random images without any meaning, for the ensemble to label or to start inversion from: one file a family."""
