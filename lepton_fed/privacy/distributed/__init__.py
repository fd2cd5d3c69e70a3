"""Differential privacy of sums: each site adds its share of the noise, in the integer ring.

Everything here is a function of its arguments; :mod:`lepton_fed.privacy.client` is how runs use it.
"""
