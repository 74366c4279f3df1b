"""Uploads: decode them from Flower records, validate them, write them to disk and read them back."""
