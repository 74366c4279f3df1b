"""Derive the seeds of batches and clients from `run.seed`, so that different ones get different seeds."""

from __future__ import annotations

STRIDE = 1_000_003
"""A prime far above the number of batches and clients of a run."""


def batch_seed(seed: int, number: int) -> int:
    """Return the seed of the batch `number`, counted from 0."""
    return seed * STRIDE + number


def client_seed(seed: int, client: int, round_number: int) -> int:
    """Return the training seed of a client in a round, counted from 1."""
    return seed + client + STRIDE * (round_number - 1)
