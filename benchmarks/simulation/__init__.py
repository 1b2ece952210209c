"""What the simulation itself costs, beside the training that it runs."""
