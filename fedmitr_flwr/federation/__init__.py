"""The Flower strategy, checks before a run, the exchange of messages, and the validation of uploads."""
