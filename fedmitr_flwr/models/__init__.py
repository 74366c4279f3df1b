"""The timm Vision Transformer: build it, run it on a subset of its patches, read and write checkpoints."""
