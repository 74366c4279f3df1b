"""Flower ServerApp: collects uploads, makes the global model, and writes the results."""
