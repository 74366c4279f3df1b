"""An app of one's own around FedMITR."""
