"""What a trained model is worth: losses on held-out text."""
