"""Client-level differential privacy by a coordinator that is trusted with single updates.

Everything here is a function of its arguments; :mod:`lepton_fed.privacy.client` is how runs use it.
"""
