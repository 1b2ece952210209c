"""A site's policy: what it takes part in, read from its own file, and every reason why a plan is outside it."""
