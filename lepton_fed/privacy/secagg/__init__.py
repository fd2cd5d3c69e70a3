"""Secure aggregation: its primitives, and the halves of site and coordinator built of them.

Everything here is a function of its arguments: no files, no network, no clock. Bad input raises
ValueError, in the protocol FalseMessage with the name of who is to blame, and a text that holds no
secret. No run uses it yet.
"""
