"""Configuration: schema, composition, and the study plan that travels."""
