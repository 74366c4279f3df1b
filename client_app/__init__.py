"""Flower ClientApp: local training, once."""
