"""A Flower app that uses FedMITR as its strategy."""
