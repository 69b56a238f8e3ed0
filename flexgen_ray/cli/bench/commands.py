"""`flexgen-ray bench …`: the benchmarks by name."""

from __future__ import annotations

from flexgen_ray.cli.app import App
from flexgen_ray.cli.bench.peers import peers
from flexgen_ray.cli.bench.throughput import throughput
from flexgen_ray.reporting.progress import with_progress

app = App()
for command in (throughput, peers):
    app.command()(with_progress(command, f"bench {command.__name__}"))
