"""A timm Vision Transformer on any subset of its patches: building, weights, checkpoint folders."""
