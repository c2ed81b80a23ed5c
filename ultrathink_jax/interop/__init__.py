"""Models on disk in formats other programs read."""
