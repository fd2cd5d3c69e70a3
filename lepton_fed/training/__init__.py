"""The local training step and evaluation: one place for every engine."""
