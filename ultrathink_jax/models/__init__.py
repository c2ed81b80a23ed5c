"""The decoder: layers by pattern, caches, parameter and FLOP counts."""
