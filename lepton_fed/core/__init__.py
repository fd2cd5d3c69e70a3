"""The nouns: task, layout, update, digests, seeds, ring sums, metrics. No I/O."""
