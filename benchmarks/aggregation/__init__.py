"""What aggregation costs, and what it is worth."""
