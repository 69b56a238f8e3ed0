"""Commands of `flexgen-ray bench`, by name."""

from __future__ import annotations

from collections.abc import Callable

from flexgen_ray.cli.app import App
from flexgen_ray.cli.bench.peers import peers
from flexgen_ray.cli.bench.scaling import scaling
from flexgen_ray.cli.bench.throughput import throughput
from flexgen_ray.cli.bench.workload import workload
from flexgen_ray.reporting.progress import with_progress

SHORT_HELP: dict[Callable[..., None], str] = {
    throughput: "Generated tokens/s on equal prompts, and the fraction of the hardware's bound.",
    workload: "Generated tokens/s on requests of mixed lengths, and what the mixture wastes.",
    scaling: "Tokens/s over the number of pipeline stages, against copies of one stage.",
    peers: "Speed ratio to other systems, which do equal work in turns.",
}

app = App(rich_markup_mode=None)
for command, short_help in SHORT_HELP.items():
    app.command(short_help=short_help)(with_progress(command, f"bench {command.__name__}"))
