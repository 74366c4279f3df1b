"""Flower ServerApp: settings, strategy, evaluation, outputs."""
