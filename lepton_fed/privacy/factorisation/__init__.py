"""DP-FTRL: noise that is correlated over steps, for sites that cannot promise Poisson sampling.

Everything here is a function of its arguments; no run uses it yet.
"""
