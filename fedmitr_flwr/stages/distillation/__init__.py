"""Stage 4: the ensemble's knowledge into one student."""
