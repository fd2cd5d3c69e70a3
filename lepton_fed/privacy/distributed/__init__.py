"""Differential privacy of sums: each site adds its share of the noise, in the integer ring.

Everything here is a function of its arguments; no run uses it yet.
"""
