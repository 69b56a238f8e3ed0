"""What proves claims to ourselves: each runs as `python -m benchmarks.NAME`."""
