"""Commands for a federation of several machines."""
