"""Flower ClientApp: trains once on local images and uploads the weights."""
