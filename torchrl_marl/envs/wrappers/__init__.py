"""Environments of other packages with the keys of this library."""
