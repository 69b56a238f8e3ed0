"""The options that several commands share, with their help.

An option that configures LLM, Policy or SamplingParams has the name of its Python argument, with
dashes. Knows names and help texts; no model and no machine.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from flexgen_ray.cli.app import Writes
from flexgen_ray.cli.exits import parse_max_errors

# Headings of a command's help, in the order in which `generate` shows them.
MODEL = "Model"
FILES = "Input and output"
SAMPLING = "Sampling, for requests that don't set it themselves"
PLANNING = "Planning"
LOSSY = "Quantization and sparsity (lossy)"
MEMORY = "Device and memory"
CLUSTER = "Pipeline and Ray cluster"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class LoadFormat(StrEnum):
    auto = "auto"
    dummy = "dummy"


class Transport(StrEnum):
    auto = "auto"
    nccl = "nccl"
    gloo = "gloo"


def parse_device(name: str) -> str:
    """A device's name as given; BadParameter if no device can have it."""
    from flexgen_ray.config import DEVICES, is_device

    if not is_device(name):
        raise typer.BadParameter(f"{name!r} must be {DEVICES}")
    return name


def parse_stages(text: str) -> int | str:
    """A number of pipeline stages, or "auto"; BadParameter for anything else."""
    if text != "auto" and not (text.isdecimal() and int(text)):
        raise typer.BadParameter(f"{text!r} is neither auto nor a number from 1 up")
    return int(text) if text.isdecimal() else text


ModelOption = Annotated[
    str,
    typer.Option(
        metavar="MODEL",
        rich_help_panel=MODEL,
        help="Model folder in Hugging Face's format (safetensors), or a model's name on the "
        "Hugging Face hub, such as Qwen/Qwen3-32B. With --load-format dummy also a built-in shape, "
        "such as opt-30b.",
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        rich_help_panel=MODEL,
        help="Number format of weights, KV cache and hidden states. auto: on a GPU the "
        "checkpoint's (float16 in place of bfloat16 where the GPU has no fast bfloat16); on a CPU "
        "float32, or bfloat16 if the checkpoint has it and the CPU is fast in it.",
    ),
]
LoadFormatOption = Annotated[
    LoadFormat,
    typer.Option(
        rich_help_panel=MODEL,
        help="Source of the weights. auto: the model's safetensors files. dummy: random weights, "
        "to measure speed without a checkpoint; the text is nonsense.",
    ),
]
MaxModelLenOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        rich_help_panel=MODEL,
        help="Limit on the tokens of a prompt and its answer together. Longer prompts get an error "
        "row; answers end at the limit. [default: the model's context length; memory is planned "
        "for the longest request]",
    ),
]

InputOption = Annotated[
    Path,
    typer.Option(
        metavar="FILE",
        rich_help_panel=FILES,
        help='JSONL file of requests, one a line: OpenAI Batch lines, {"prompt": ...}, or '
        '{"messages": [...]}, which is formatted with the model\'s chat template. Files that end '
        "in .gz are decompressed; - is standard input.",
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        writable=True,
        rich_help_panel=FILES,
        help="JSONL file of responses to write, one line a request. Files that end in .gz are "
        "compressed; - is standard output. [required, except with --dry-run]",
    ),
    Writes.JOB,
]
OverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite/--resume",
        rich_help_panel=FILES,
        help="Start over, or answer only the requests that the output lacks.",
    ),
]
RetryOption = Annotated[
    bool,
    typer.Option(
        "--retry-errors",
        rich_help_panel=FILES,
        help="Answer the lines that have an error row again, and replace those rows.",
    ),
]
KeepOrderOption = Annotated[
    bool,
    typer.Option(
        "--keep-order",
        rich_help_panel=FILES,
        help="Write responses in the order of the input. Without this flag each is written as soon "
        "as it is finished.",
    ),
]
MaxErrorsOption = Annotated[
    float | None,
    typer.Option(
        parser=parse_max_errors,
        metavar="N|SHARE",
        rich_help_panel=FILES,
        help="Number of error rows, such as 5, or share of the lines, such as 0.001, up to which "
        "the exit status is still 0. [default: 0]",
    ),
]
ReportOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        writable=True,
        rich_help_panel=FILES,
        help="JSON file to write the final report to, which is also printed. [default: only print]",
    ),
]
TraceOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        writable=True,
        rich_help_panel=FILES,
        help="File to write a Chrome trace to: the start and duration of every op, one row a lane. "
        "Open it in ui.perfetto.dev. [default: no trace]",
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        writable=True,
        help="Image to draw the result to, .png or .svg; needs matplotlib. [default: no plot]",
    ),
]
JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        writable=True,
        rich_help_panel=FILES,
        help="JSON file to write the result to. [default: only print]",
    ),
]

MaxTokensOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        rich_help_panel=SAMPLING,
        help="Maximum tokens of an answer. [default: the model's generation_config.json; else 16 "
        "for prompts, and for chats the rest of the context]",
    ),
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        rich_help_panel=SAMPLING,
        help="Sampling temperature, from 0 up; 0 is greedy. [default: the model's "
        "generation_config.json, else 1.0]",
    ),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        metavar="TEXT",
        rich_help_panel=SAMPLING,
        help="Text that ends an answer, such as '<|im_end|>'; give the option again for each "
        "further text. A newline is $'\\n' in bash. [default: none]",
    ),
]
SeedOption = Annotated[
    int,
    typer.Option(
        metavar="N",
        rich_help_panel=SAMPLING,
        help="Seed of the random numbers; equal seeds give equal answers.",
    ),
]

DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        rich_help_panel=PLANNING,
        help="Check the input and the options, print the plan and the predicted time, and end. "
        "Writes nothing and loads no weights.",
    ),
]
PlanForOption = Annotated[
    str | None,
    typer.Option(
        metavar="HARDWARE",
        rich_help_panel=PLANNING,
        help="Hardware preset, such as t4, or YAML file whose rates the plan uses. With --dry-run "
        "its memory counts too, and each pipeline stage gets such a machine. [default: this "
        "machine, if calibrated]",
    ),
]
MaxLatencyOption = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        rich_help_panel=PLANNING,
        help="Limit on the planned time of a block of requests, from its start to its last answer. "
        "[default: no limit]",
    ),
]

DeviceOption = Annotated[
    str,
    typer.Option(
        metavar="[auto|cpu|cuda|cuda:N]",
        callback=parse_device,
        rich_help_panel=MEMORY,
        help="Device that computes the layers. auto: a CUDA GPU if there is one, else the CPU; "
        "cuda:1 is the second GPU.",
    ),
]
PolicyOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE|auto",
        rich_help_panel=MEMORY,
        help="YAML file with batch sizes and the shares of weights, KV cache and hidden states on "
        "GPU, host and disk. auto: planned for the highest throughput if the hardware's rates are "
        "known (calibrated, or a preset of its GPU); else memory is filled, fastest tier first. "
        "[default: auto]",
    ),
]
GpuOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        rich_help_panel=MEMORY,
        help="GPU memory budget of each stage, such as 16GiB. [default: 90% of what is free]",
    ),
]
CpuOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        rich_help_panel=MEMORY,
        help="Host memory budget of each machine, such as 64GiB. [default: 80% of what is free]",
    ),
]
DiskOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        rich_help_panel=MEMORY,
        help="Disk space budget of each machine, such as 200GiB. [default: 90% of what is free]",
    ),
]
OffloadOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        rich_help_panel=MEMORY,
        help="Folder for data that is offloaded to disk; a fast local disk is best. [default: "
        "flexgen_ray/offload in $XDG_CACHE_HOME, else in ~/.cache]",
    ),
    Writes.SCRATCH,
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        rich_help_panel=MEMORY,
        help="Host threads of each stage. [default: OMP_NUM_THREADS, unless Ray set it (in jobs "
        "and `ray submit`); else the stage's share of the node's cores]",
    ),
]
EnablePrefixCachingOption = Annotated[
    bool,
    typer.Option(
        rich_help_panel=MEMORY,
        help="Compute what several prompts begin with (headers, examples, the prompt of n answers) "
        "once, in whole pages of 16 tokens, or with each prompt.",
    ),
]

WeightBitsOption = Annotated[
    int | None,
    typer.Option(
        metavar="4|8",
        rich_help_panel=LOSSY,
        help="Quantize the layers' weights to 4 or 8 bits (groups of 64). Lossy. [default: not "
        "quantized]",
    ),
]
CacheBitsOption = Annotated[
    int | None,
    typer.Option(
        metavar="4|8",
        rich_help_panel=LOSSY,
        help="Quantize the KV cache to 4 or 8 bits (groups of 64). Lossy. [default: not quantized]",
    ),
]
EmbeddingBitsOption = Annotated[
    int | None,
    typer.Option(
        metavar="4|8",
        rich_help_panel=LOSSY,
        help="Quantize the embedding and the output head to 4 or 8 bits (groups of 64). Lossy. "
        "[default: not quantized]",
    ),
]
AttentionSparsityOption = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        rich_help_panel=LOSSY,
        help="Share of each sequence's tokens that decoding attends to, above 0 and at most 1, "
        "such as 0.1: those with the largest attention weights. Below 1 it is lossy. [default: "
        "1.0]",
    ),
]

PipelineOption = Annotated[
    str,
    typer.Option(
        parser=parse_stages,
        metavar="N|auto",
        rich_help_panel=CLUSTER,
        help="Number of pipeline stages, each with its share of the layers. auto: one for every "
        "GPU of the cluster.",
    ),
]
UseRayOption = Annotated[
    bool,
    typer.Option(
        rich_help_panel=CLUSTER,
        help="Run each stage in a Ray actor, or all of them in this process.",
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        rich_help_panel=CLUSTER,
        help="Address of the Ray cluster to run on. [default: RAY_ADDRESS, else a cluster on this "
        "machine, started for this run]",
    ),
]
TransportOption = Annotated[
    Transport,
    typer.Option(
        rich_help_panel=CLUSTER,
        help="Library that sends hidden states between stages. auto: nccl if every stage has a "
        "GPU, else gloo.",
    ),
]
RestartsOption = Annotated[
    int,
    typer.Option(
        metavar="N",
        rich_help_panel=CLUSTER,
        help="Maximum number of times that lost stages are replaced before the run fails.",
    ),
]
StallOption = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        rich_help_panel=CLUSTER,
        help="Time without progress after which a stage counts as lost.",
    ),
]
RestartTimeoutOption = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        rich_help_panel=CLUSTER,
        help="Time limit for replacing lost stages. [default: 120, or 600 where the cluster may "
        "start machines]",
    ),
]
WaitOption = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        rich_help_panel=CLUSTER,
        help="Time limit for waiting until the Ray cluster has room. [default: 10, or 900 where "
        "the cluster may start machines]",
    ),
]


def llm_options(
    model: ModelOption,
    dtype: DtypeOption = Dtype.auto,
    load_format: LoadFormatOption = LoadFormat.auto,
    max_model_len: MaxModelLenOption = None,
    device: DeviceOption = "auto",
    policy: PolicyOption = None,
    gpu_memory: GpuOption = None,
    cpu_memory: CpuOption = None,
    disk_memory: DiskOption = None,
    offload_dir: OffloadOption = None,
    threads: ThreadsOption = None,
    enable_prefix_caching: EnablePrefixCachingOption = True,
    weight_bits: WeightBitsOption = None,
    cache_bits: CacheBitsOption = None,
    embedding_bits: EmbeddingBitsOption = None,
    attention_sparsity: AttentionSparsityOption = None,
    pipeline_parallel_size: PipelineOption = "1",
    use_ray: UseRayOption = True,
    address: AddressOption = None,
    transport: TransportOption = Transport.auto,
    max_restarts: RestartsOption = 3,
    stall_timeout: StallOption = 300.0,
    restart_timeout: RestartTimeoutOption = None,
    wait: WaitOption = None,
) -> dict[str, Any]:
    """LLM's keyword arguments, from options of the same names."""
    return {
        name: value.value if isinstance(value, StrEnum) else value
        for name, value in locals().items()
    }


def with_llm_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command with LLM's options beside its own; it gets LLM's arguments as `engine`."""
    shared = list(signature(llm_options, eval_str=True).parameters.values())
    own = dict(signature(command, eval_str=True).parameters)
    del own["engine"]

    @wraps(command)
    def run(**values: Any) -> None:
        options = {each.name: values.pop(each.name) for each in shared}
        command(engine=llm_options(**options), **values)

    parameters = [
        each.replace(kind=Parameter.KEYWORD_ONLY)
        for each in (shared[0], *own.values(), *shared[1:])
    ]
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run
