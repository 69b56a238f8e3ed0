"""The step that runs two stages in Ray actors on two GPUs over NCCL, and compares tokens."""

from __future__ import annotations

from flexgen_ray.qualification.setting import Figures, Setting, Skipped, run_step
from flexgen_ray.qualification.two_actors import compare_stages


def nccl(setting: Setting, figures: Figures) -> None:
    """Run two stages over NCCL, if there are two GPUs."""
    import torch

    count = torch.cuda.device_count() if setting.on_cuda else 0
    if count < 2:
        raise Skipped(f"NCCL needs two GPUs, and this machine has {count}")
    compare_stages(setting, figures, "nccl")


if __name__ == "__main__":
    run_step(nccl)
