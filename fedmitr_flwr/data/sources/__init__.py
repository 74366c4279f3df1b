"""Image sources: one file for each kind."""
