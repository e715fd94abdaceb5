"""Cooperative games written in Torch, as pure functions on a state."""
