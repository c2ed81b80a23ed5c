"""Programs that measure speed and memory, and print the ratio to peers; see benchmarks/results/."""
