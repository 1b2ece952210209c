"""A site: its records, its training, its replies."""
