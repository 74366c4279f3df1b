"""Local training on a client, its upload, and the common initialisation of all clients."""
