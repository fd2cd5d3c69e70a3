"""Secure aggregation's primitives: masks, secret sharing, key agreement, envelopes, commitments.

Everything here is a function of its arguments: no files, no network, no clock. Bad input raises
ValueError with a text that holds no secret; the protocol turns it into a refusal and names the
site.
"""
