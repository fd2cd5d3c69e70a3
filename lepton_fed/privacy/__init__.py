"""Differential privacy, the ledger of what was spent, and secure aggregation."""
