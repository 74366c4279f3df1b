"""Image sources, one module for each kind."""
