"""Flower: the strategy, uploads and their checks, the exchange of messages, and what is checked before a run."""
