"""Trains hybrid attention / Mamba-2 / mixture-of-experts language models in JAX."""
