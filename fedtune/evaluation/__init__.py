"""Metrics of an adapter on held-out records."""
