"""The coordinator: rounds, validation, checkpoints."""
