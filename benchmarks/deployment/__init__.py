"""What a federation between machines costs: bytes on their way, memory of each process, and seconds beside training."""
