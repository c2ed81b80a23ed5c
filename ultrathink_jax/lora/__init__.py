"""Adapters, and what else of a model is trained while the rest is frozen."""
