"""Architectures by name, and the passage between a model and its flat vector."""
