"""The results of a run: evaluation, model, model card and report."""
