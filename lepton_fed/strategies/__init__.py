"""How updates become the next model: one file a strategy, both halves side by side."""
