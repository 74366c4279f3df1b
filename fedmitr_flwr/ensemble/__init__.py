"""K teachers as one function."""
