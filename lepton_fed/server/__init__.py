"""The coordinator: rounds, admission of replies, checkpoints."""
