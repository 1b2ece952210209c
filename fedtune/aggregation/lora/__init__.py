"""Every LoRA aggregation algorithm: a site half and a server half side by side, one file an algorithm."""
