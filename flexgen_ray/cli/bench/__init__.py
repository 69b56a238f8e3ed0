"""How fast is it on my machine? The benchmarks that users run."""
