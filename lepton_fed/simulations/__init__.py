"""Engines that run the same task and strategies without a network."""
