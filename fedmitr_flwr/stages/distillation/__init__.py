"""Stage 4: distil the ensemble into one student."""
