"""Does the project do what it claims? Benchmarks for a checkout: `python -m benchmarks.NAME`."""
