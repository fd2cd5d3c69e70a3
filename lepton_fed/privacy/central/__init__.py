"""Client-level differential privacy by a coordinator that is trusted with single updates.

Everything here is a function of its arguments; no run uses it yet.
"""
