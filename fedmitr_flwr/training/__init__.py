"""What happens on a client, and the weights that all clients start from."""
