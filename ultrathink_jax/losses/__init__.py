"""What a run minimises, as sums over the global batch."""
