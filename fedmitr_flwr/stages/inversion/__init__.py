"""Stage 1: synthetic images from the teachers."""
