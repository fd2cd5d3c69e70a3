"""Ways to get the sum of clipped per-record gradients; they differ in time and memory alone."""
