"""What a run leaves: evaluation, model, card, report."""
