"""fedtune: organisations fine-tune one language model together; no record leaves its site."""

__version__ = "0.1.0"
