"""What several tests share: tiny models and data, a study without a model's cost, a client application that misbehaves."""
