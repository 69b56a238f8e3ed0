"""The options that several commands share, with their help."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from flexgen_ray.cli.exits import parse_max_errors


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def _device(name: str) -> str:
    from flexgen_ray.config import DEVICES, is_device

    if not is_device(name):
        raise typer.BadParameter(f"{name!r} must be {DEVICES}")
    return name


ModelOption = Annotated[
    str,
    typer.Option(
        help="Hugging Face model folder (safetensors), or a name on its hub; with --dummy-weights "
        "also a shape, such as opt-30b."
    ),
]
InputOption = Annotated[
    Path,
    typer.Option(
        help='JSONL: OpenAI Batch lines, {"prompt": ...} or {"messages": ...}; .gz; - is standard '
        "input."
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        writable=True,
        help="JSONL of responses, one line a request; .gz; - is standard output. Required but for "
        "--dry-run.",
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check everything, print the plan and how long it would take, and end: nothing is "
        "written, no weights are loaded.",
    ),
]
PlanForOption = Annotated[
    str | None,
    typer.Option(
        "--hardware",
        help="Plan by the rates of this hardware preset or file instead of this machine's; with "
        "--dry-run for its memory too, a machine for each of --stages.",
    ),
]
MaxLatencyOption = Annotated[
    float | None,
    typer.Option(help="Seconds that a block may take from its start to its last answer."),
]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite/--resume", help="Answer all anew, or what the output lacks yet."),
]
RetryOption = Annotated[
    bool,
    typer.Option(
        "--retry-errors",
        help="Answer again the lines that have an error row, which new rows replace, as after an "
        "update or once the model has the tokenizer that it lacked.",
    ),
]
KeepOrderOption = Annotated[
    bool, typer.Option("--keep-order", help="In the input's order, not as answers are finished.")
]
MaxErrorsOption = Annotated[
    float | None,
    typer.Option(
        parser=parse_max_errors,
        metavar="N|SHARE",
        help="Error rows with which the exit status still is 0: a number of lines, such as 5, or "
        "a share, such as 0.001. [default: 0]",
    ),
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option(
        help="Most tokens of an answer, for lines that don't set it. [default: the model's "
        "generation_config.json; else 16 for prompts, and what the context leaves, up to 2,048, "
        "for chats]"
    ),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        help="Text that ends an answer, for lines that set no stop; may be given several times. "
        "Special tokens work too, such as '<|im_end|>'. A newline is $'\\n' in bash. "
        "[default: none]",
    ),
]
TemperatureOption = Annotated[
    float | None, typer.Option(help="Likewise; the model's own, or 1; 0 is greedy.")
]
DummyOption = Annotated[
    bool,
    typer.Option(
        "--dummy-weights",
        help="Make weights up, to measure without a checkpoint; text is nonsense.",
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        help="auto: the checkpoint's on a GPU; on a CPU float32, or bfloat16 if both have it."
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        metavar="[auto|cpu|cuda|cuda:N]",
        callback=_device,
        help="Where the layers run; auto is a CUDA GPU if there is one, cuda:1 the second one.",
    ),
]
PolicyOption = Annotated[
    Path | None,
    typer.Option(
        help="YAML policy, or auto: planned if the machines were calibrated or their GPUs have a "
        "preset, else the tiers are filled, fastest first."
    ),
]
WeightBitsOption = Annotated[
    int | None, typer.Option(help="4 or 8: keep weights quantized in groups of 64. Lossy.")
]
EmbeddingBitsOption = Annotated[
    int | None, typer.Option(help="The same of the embedding and the head.")
]
CacheBitsOption = Annotated[int | None, typer.Option(help="The same of keys and values.")]
SparsityOption = Annotated[
    float | None,
    typer.Option(
        "--sparsity", help="Share of its tokens that decoding attends, such as 0.1. Lossy."
    ),
]
GpuOption = Annotated[
    str | None, typer.Option(help="GPU memory to use, such as 16GiB; what is free.")
]
CpuOption = Annotated[
    str | None, typer.Option(help="Host memory to use, such as 64GiB; what is free.")
]
DiskOption = Annotated[
    str | None, typer.Option(help="Disk space to use, such as 200GiB; what is free.")
]
OffloadOption = Annotated[
    Path | None, typer.Option(help="Folder for offloaded data; the user's cache if not given.")
]
ReportOption = Annotated[
    Path | None,
    typer.Option(writable=True, help="Also write the final report to this JSON file."),
]
TraceOption = Annotated[
    Path | None,
    typer.Option(
        writable=True, help="Write when every op ran, one row a lane, for ui.perfetto.dev."
    ),
]
StagesOption = Annotated[
    str, typer.Option(help="Pipeline stages, each a Ray actor; auto: one for every GPU.")
]
TransportOption = Annotated[
    str, typer.Option(help="Between stages: nccl, gloo, or auto, nccl if each has a GPU.")
]
RestartsOption = Annotated[int, typer.Option(help="Times that lost stages are replaced.")]
StallOption = Annotated[
    float, typer.Option(help="Seconds without progress after which a stage counts as lost.")
]
NoRayOption = Annotated[bool, typer.Option("--no-ray", help="Run in this process, without Ray.")]
MaxModelLenOption = Annotated[
    int | None,
    typer.Option(
        help="Longest prompt and answer together, in tokens: longer prompts get an error row, and "
        "answers end there. [default: the model's context; memory is planned for the longest line]"
    ),
]
WaitOption = Annotated[
    float | None,
    typer.Option(
        help="Seconds to wait for room on the Ray cluster. [default: 10, or 900 where it may start "
        "machines]"
    ),
]
RestartTimeoutOption = Annotated[
    float | None,
    typer.Option(
        help="Seconds that lost stages may take to start elsewhere. [default: 120, or 600 where "
        "the cluster may start machines]"
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        help="Host threads of each stage. [default: OMP_NUM_THREADS, unless Ray set it, as it does "
        "in jobs and in `ray submit`; else the stage's share of the node's cores]"
    ),
]
AddressOption = Annotated[
    str | None, typer.Option(help="Ray cluster; RAY_ADDRESS, or one of its own, if not given.")
]
PlotOption = Annotated[
    Path | None,
    typer.Option(writable=True, help="Also draw it, as .png or .svg; needs matplotlib."),
]
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", writable=True, help="Also write the result to this file."),
]


def _engine(
    model: ModelOption,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    policy: PolicyOption = None,
    weight_bits: WeightBitsOption = None,
    cache_bits: CacheBitsOption = None,
    embedding_bits: EmbeddingBitsOption = None,
    sparsity: SparsityOption = None,
    gpu_memory: GpuOption = None,
    cpu_memory: CpuOption = None,
    disk_memory: DiskOption = None,
    offload_dir: OffloadOption = None,
    stages: StagesOption = "1",
    transport: TransportOption = "auto",
    max_restarts: RestartsOption = 3,
    stall_timeout: StallOption = 300.0,
    restart_timeout: RestartTimeoutOption = None,
    wait: WaitOption = None,
    threads: ThreadsOption = None,
    max_model_len: MaxModelLenOption = None,
    no_ray: NoRayOption = False,
    address: AddressOption = None,
    dummy_weights: DummyOption = False,
) -> dict[str, Any]:
    """An LLM's keyword arguments."""
    from flexgen_ray.config import Faults

    return {
        "model": model, "dtype": dtype.value, "device": device, "policy": policy,
        "weight_bits": weight_bits, "cache_bits": cache_bits, "embedding_bits": embedding_bits,
        "attention_sparsity": sparsity,
        "gpu_memory": gpu_memory, "cpu_memory": cpu_memory, "disk_memory": disk_memory,
        "offload_dir": offload_dir, "pipeline_parallel_size": num_stages(stages),
        "use_ray": not no_ray, "address": address, "transport": transport,
        "faults": Faults(max_restarts, stall_timeout, restart_timeout), "threads": threads,
        "wait": wait, "max_model_len": max_model_len,
        "load_format": "dummy" if dummy_weights else "auto",
    }  # fmt: skip


def num_stages(text: str) -> int | str:
    """A number, or auto; ValueError, in the option's name, for other words."""
    if text != "auto" and not (text.isdecimal() and int(text)):
        raise ValueError(f"--stages is {text!r}; it must be auto or a number from 1 up")
    return int(text) if text.isdecimal() else text


def with_engine(command: Callable[..., None]) -> Callable[..., None]:
    """A command that has an LLM's options beside its own; it gets them as `engine`, the LLM's
    keyword arguments."""
    engine = list(signature(_engine, eval_str=True).parameters.values())
    own = dict(signature(command, eval_str=True).parameters)
    del own["engine"]

    @wraps(command)
    def run(**values: Any) -> None:
        options = {it.name: values.pop(it.name) for it in engine}
        command(engine=_engine(**options), **values)

    parameters = [
        it.replace(kind=Parameter.KEYWORD_ONLY) for it in (engine[0], *own.values(), *engine[1:])
    ]
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {it.name: it.annotation for it in parameters}
    return run
