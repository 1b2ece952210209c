"""Text from an adapted model, for a look: prompts laid out as in training, and one token after the other."""
