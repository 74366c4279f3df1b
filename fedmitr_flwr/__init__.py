"""One-shot federated learning for Vision Transformers (FedMITR) as a Flower app."""

__version__ = "0.1.0"
