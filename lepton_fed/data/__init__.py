"""Rows: contract, readers, preprocessing, partitioners."""
