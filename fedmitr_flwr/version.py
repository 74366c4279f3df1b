"""The version of this package. It stands here alone, so that naming it imports nothing else."""

__version__ = "0.1.0"
