"""The HTML report of a run, and the description of a configuration."""
