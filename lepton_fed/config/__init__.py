"""Conf files: schema, loading with located errors, overrides, explanations."""
