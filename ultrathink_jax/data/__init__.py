"""Sources of documents, their tokens on disk, and packed batches that depend on the step alone."""
