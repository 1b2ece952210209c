"""The run folder: plan, checkpoints, metrics, summary; every write is whole or absent."""
