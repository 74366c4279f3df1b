"""Commands for a deployed federation of several machines."""
