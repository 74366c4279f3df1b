"""Start Flower and follow its runs; make keys, certificates and site data; check a machine."""
