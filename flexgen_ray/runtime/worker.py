"""Worker: one stage and the machine that it runs on, behind four calls: probe, load, add, run.

A pipeline in one process uses it as it is; distributed/ makes it a Ray actor. Knows no Ray.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flexgen_ray.config import DEVICES, HardwareSpec, is_device
from flexgen_ray.hardware.gpu_memory import drop_workspaces, load_libraries
from flexgen_ray.hardware.host import default_threads, free_memory, release_openmp_team
from flexgen_ray.hardware.known import ASSUMED, CALIBRATED, assume_from_preset, load_calibrated
from flexgen_ray.hardware.measure import measure_rates
from flexgen_ray.hardware.rates import MemorySizes
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.paths import find_model
from flexgen_ray.request import Finished, Request
from flexgen_ray.runtime.events import OnProgress, Progress, ignore_progress
from flexgen_ray.runtime.handlers import LogitsHook
from flexgen_ray.runtime.lanes import Heartbeat
from flexgen_ray.runtime.meter import StageMeasurements
from flexgen_ray.runtime.ring import Channel
from flexgen_ray.runtime.stage import LOADING, Stage, StageSpec, choose_host_kernel, cores_for
from flexgen_ray.schedule.ops import Span
from flexgen_ray.text.stop_strings import StopStrings
from flexgen_ray.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Machine:
    """A machine with its device, as a worker found it; sizes are free bytes.

    num_threads: cores for this worker; hardware: rates, if they are known.
    gpu_id: unique among all GPUs; rates_source: calibrated, given, or assumed by the GPU's name.
    library_bytes: GPU memory that kernels of CUDA's libraries take, which isn't free any more.
    """

    host: str
    device: str
    device_name: str
    gpu_bytes: int
    cpu_bytes: int
    disk_bytes: int
    num_threads: int
    is_fast_in_bfloat16: bool
    hardware: Hardware | None = None
    gpu_id: str = ""
    rates_source: str = CALIBRATED
    library_bytes: int = 0

    @property
    def on_cuda(self) -> bool:
        """True where layers run on a GPU, rather than on the host's cores."""
        return self.device.startswith("cuda")


class Worker:
    """One stage in this process; threads: number of cores it uses, None for default_threads()."""

    def __init__(self, threads: int | None = None) -> None:
        self.stage: Stage | None = None
        self._added: list[Request] = []
        self._loading = Progress()
        self._num_threads = threads or default_threads(os.environ)
        torch.set_num_threads(self._num_threads)

    def probe(self, device: str, offload_dir: str, with_rates: bool = True) -> Machine:
        """Find out what this machine has free; ValueError if it lacks the device.

        device: auto, cpu, cuda or cuda:N, which becomes the process's current CUDA device.
        with_rates: also look up the node's calibrated rates, or its GPU's preset.
        """
        chosen = find_device(device)
        uses_cuda = chosen.type == "cuda"
        _set_up(chosen)
        # First of all, because what it takes isn't free.
        library_bytes = load_libraries(chosen) if uses_cuda else 0
        memory = free_memory()
        machine = Machine(
            host=socket.gethostname(),
            device=str(chosen),
            device_name=torch.cuda.get_device_name() if uses_cuda else "CPU",
            gpu_bytes=torch.cuda.mem_get_info()[0] if uses_cuda else memory,
            cpu_bytes=memory,
            disk_bytes=_free_disk(Path(offload_dir)),
            num_threads=self._num_threads,
            is_fast_in_bfloat16=_gpu_has_bfloat16() if uses_cuda else _cpu_has_bfloat16(),
            gpu_id=str(torch.cuda.get_device_properties().uuid) if uses_cuda else "",
            library_bytes=library_bytes,
        )
        return with_known_rates(machine, Path(offload_dir)) if with_rates else machine

    def rates(self, spec: StageSpec) -> HardwareSpec:
        """Measure this machine's rates for the stage's shapes; takes a few seconds."""
        self.close()
        plan, device = spec.plan, torch.device(spec.device)
        _set_up(device)
        attend = choose_host_kernel(plan, cores_for(plan, device).host, spec.budget.cpu // 2)
        return measure_rates(plan, spec.budget, device, Path(spec.offload_dir), attend)

    def load(self, spec: StageSpec, on_progress: OnProgress = ignore_progress) -> None:
        """Allocate memory and load weights; replaces the stage of an earlier load."""

        def report(event: Progress) -> None:
            self._loading = event
            on_progress(event)

        self.close()
        _set_up(torch.device(spec.device))
        report(Progress(phase=LOADING))
        if spec.model:
            spec = replace(spec, model=str(find_model(spec.model)))
        self._tokenizer = Tokenizer(spec.model) if spec.model else None
        find_stop = StopStrings(self._tokenizer).newest if self._tokenizer else None
        self.stage = Stage(spec, find_stop, report)
        release_openmp_team()

    def loading(self) -> Progress:
        """Progress of loading weights; may be called from any thread."""
        return self._loading

    def connect(self, channel: Channel | None) -> None:
        """Connect the stage to its neighbours; None if it is the whole model."""
        assert self.stage is not None, "load comes first"
        self.stage.connect(channel)

    def add(self, requests: list[Request]) -> None:
        """Queue requests for the next run."""
        assert self.stage is not None, "load comes first"
        if self._tokenizer and any(request.params.stop for request in requests):
            self._tokenizer.load()
        self._added += requests

    def run(self, on_logits: LogitsHook | None = None) -> Generator[Finished | Progress]:
        """Run what was added; see Stage.run."""
        assert self.stage is not None, "load comes first"
        requests, self._added = self._added, []
        yield from self.stage.run(requests, on_logits)

    def heartbeat(self) -> Heartbeat:
        """Progress of the run; may be called from any thread."""
        return self.stage.heartbeat() if self.stage else Heartbeat()

    def busy(self) -> dict[str, float]:
        """Seconds that each lane has been busy in the run so far; from any thread."""
        return self.stage.busy() if self.stage else {}

    def used(self) -> dict[str, dict[str, int]]:
        """Bytes that the stage holds, {tier: {kind of data: bytes}}."""
        return self.stage.used() if self.stage else {}

    def measured(self) -> StageMeasurements:
        """Measurements of the last run."""
        return self.stage.measured() if self.stage else StageMeasurements()

    def spans(self, first: int, count: int) -> list[Span]:
        """Some of the last run's ops with their times, if the stage keeps these."""
        return self.stage.spans[first : first + count] if self.stage else []

    def abort(self) -> None:
        """Drop the stage after a run that didn't end, with the requests that it left."""
        self.close()

    def close(self) -> None:
        """Free memory and offload files."""
        self._added = []
        if self.stage is not None:
            self.stage.close()
            self.stage = None
            # Useless to the next stage, which has streams of its own.
            drop_workspaces()


def find_device(name: str) -> torch.device:
    """Device of torch for auto, cpu, cuda or cuda:N; auto is the current GPU if there is one.

    Raises ValueError for other names, and for a GPU that isn't there.
    """
    if not is_device(name):
        raise ValueError(f"device is {name!r}; it must be {DEVICES}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    if not count:
        raise ValueError(
            f"--device {name}, but {socket.gethostname()} has no CUDA device that torch can use; "
            "use --device cpu, or install a CUDA build of torch"
        )
    index = int(name[5:]) if name.startswith("cuda:") else torch.cuda.current_device()
    if index >= count:
        raise ValueError(
            f"--device {name}, but {socket.gethostname()} has {count} CUDA devices that torch can "
            f"use; the last one is cuda:{count - 1}"
        )
    return torch.device("cuda", index)


def _set_up(device: torch.device) -> None:
    """Make a GPU this thread's current one, and choose torch's attention on it for the process.

    On GPUs from Hopper on, torch 2.11 and later prefer cuDNN's attention in half precision. cuDNN
    makes a plan for each new length of a cache, in the thread that issues all ops, and here each
    pass has new lengths.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)


def with_known_rates(machine: Machine, offload_dir: Path) -> Machine:
    """The machine with the node's calibrated rates, or its GPU's preset, if there are any."""
    uses_cuda = machine.on_cuda
    if hardware := load_calibrated(uses_cuda):
        return replace(machine, hardware=hardware)
    if not uses_cuda:
        return machine
    sizes = MemorySizes(machine.gpu_bytes, machine.cpu_bytes, max(machine.disk_bytes, 1))
    hardware = assume_from_preset(machine.device_name, sizes, machine.num_threads, offload_dir)
    return replace(machine, hardware=hardware, rates_source=ASSUMED)


def _free_disk(folder: Path) -> int:
    """Free bytes on the file system that holds, or will hold, the folder; 0 if not writable."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free if os.access(folder, os.W_OK) else 0


def _gpu_has_bfloat16() -> bool:
    """True from Ampere on: before, torch's bfloat16 attention needs tokens x tokens tensors."""
    return torch.cuda.get_device_capability() >= (8, 0)


def _cpu_has_bfloat16() -> bool:
    """True if the CPU multiplies bfloat16 by instructions of its own."""
    cpu = torch.backends.cpu.get_cpu_capability()
    if not cpu.startswith("AVX512"):
        return False
    flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    return "avx512_bf16" in flags or "amx_bf16" in flags
