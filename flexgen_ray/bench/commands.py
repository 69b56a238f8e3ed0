"""`flexgen-ray bench …`: the benchmarks by name."""

from __future__ import annotations

from flexgen_ray.bench.accuracy import accuracy
from flexgen_ray.bench.attention import attention
from flexgen_ray.bench.choice import choice
from flexgen_ray.bench.issue import issue
from flexgen_ray.bench.lanes import lanes
from flexgen_ray.bench.loading import loading
from flexgen_ray.bench.paper import paper
from flexgen_ray.bench.peers import peers
from flexgen_ray.bench.prediction import prediction
from flexgen_ray.bench.ring import ring
from flexgen_ray.bench.scaling import scaling
from flexgen_ray.bench.simulate import simulate
from flexgen_ray.bench.throughput import throughput
from flexgen_ray.bench.unequal import unequal
from flexgen_ray.commands import App
from flexgen_ray.progress import while_it_runs

app = App()
for command in (
    throughput,
    peers,
    lanes,
    attention,
    issue,
    scaling,
    ring,
    simulate,
    choice,
    unequal,
    prediction,
    paper,
    accuracy,
    loading,
):
    app.command()(while_it_runs(command, f"bench {command.__name__}"))
