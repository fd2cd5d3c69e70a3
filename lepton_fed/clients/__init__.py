"""A site: its data, its training, what it lets out."""
