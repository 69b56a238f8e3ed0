"""Is it fast on my machine? The benchmarks that users run: `flexgen-ray bench`."""
