"""Base models, pinned and offline; adapters in canonical order; classification heads."""
