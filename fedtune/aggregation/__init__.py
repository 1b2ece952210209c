"""LoRA algebra, aggregation algorithms, server optimisers and what can be combined."""
