"""Environments of other packages under the keys of this library."""
