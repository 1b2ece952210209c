"""Records and how they become examples: formats, templates, partitions, sampling."""
