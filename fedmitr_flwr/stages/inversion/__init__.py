"""Stage 1: invert the teachers into synthetic images."""
