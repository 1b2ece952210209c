"""What a site does in one round: Poisson batches, clipped noisy gradients, an update."""
