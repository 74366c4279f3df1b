"""The stages of the method: pure functions of tensors and settings."""
