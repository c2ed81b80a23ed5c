"""What users and the test suite try a run with."""
