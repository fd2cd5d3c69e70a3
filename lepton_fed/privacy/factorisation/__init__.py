"""DP-FTRL: noise that is correlated over steps, for sites that cannot promise Poisson sampling.

``privacy.record.mechanism: dp_ftrl`` trains with it. All here are functions of their arguments.
"""
