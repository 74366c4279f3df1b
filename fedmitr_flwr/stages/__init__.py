"""The four stages of FedMITR, as functions of tensors and settings that use neither files nor Flower."""
