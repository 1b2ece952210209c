"""Every command in the documentation runs."""
