"""An upload from Flower's record to a file: validated, written, read back."""
