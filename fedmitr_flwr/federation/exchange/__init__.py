"""The exchange of messages with the clients: a bounded window, retries, and one copy of the model for all."""
