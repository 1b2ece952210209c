"""What several tests share: tiny models and data, whole studies without a model's cost, sites that misbehave."""
