"""Durable studies: what a coordinator was asked to run, how far each is, and what comes next after any death."""
