"""What one private training step costs, against the same step without privacy and against other private engines."""
