"""The benchmarks of a qualification: models and fixed policies, in one table that is easy to renew.

Policies are near those that the planner chooses for an H100 of which 16 GiB are used, with prompts
of 512 tokens and answers of 32, and leave some memory free (such as `flexgen-ray plan --model
opt-30b --hardware h100 --gpu-memory 15.8GiB --cpu-memory 100GiB --disk-memory 1MiB`). Answers are
shorter here, so that each case ends in time. Knows policies; runs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flexgen_ray.config import Placement, Policy

GPU_MEMORY = "16GiB"  # the memory of the paper's GPU, whatever this machine's has
PROMPT_LEN = 512
_GPU = Placement(1, 0, 0)
_CPU = Placement(0, 1, 0)


@dataclass(frozen=True)
class Case:
    """A run of `flexgen-ray bench throughput`.

    name: of its step. model: built-in shape. cpu_memory: limit on host memory, which must be free.
    least_s, limit_s: as of a Step. allows_cudnn: True to let torch use cuDNN's attention.
    """

    name: str
    model: str
    policy: Policy
    max_tokens: int
    cpu_memory: str
    least_s: float
    limit_s: float
    prompt_len: int = PROMPT_LEN
    gpu_memory: str = GPU_MEMORY
    allows_cudnn: bool = False

    def tiny(self) -> Case:
        """The case for the smallest built-in shape, with everything placed alike."""
        policy = replace(self.policy, gpu_batch_size=2, num_gpu_batches=2)
        return replace(
            self, model="opt-125m", policy=policy, max_tokens=3, prompt_len=8,
            cpu_memory="1GiB", gpu_memory="1GiB",
        )  # fmt: skip


_OPT_30B = Case(
    "opt-30b",
    "opt-30b",
    Policy(6, 12, 2048, Placement(0.2, 0.8, 0), _CPU, _GPU),
    max_tokens=8,
    cpu_memory="100GiB",
    least_s=90,
    limit_s=130,
)
_OPT_67B_4BIT = Case(
    "opt-6.7b-4bit",
    "opt-6.7b",
    Policy(
        96, 2, 2048, _GPU, Placement(0.65, 0.35, 0), _GPU, cpu_attention=0.3,
        weight_bits=4, cache_bits=4,
    ),
    max_tokens=16,
    cpu_memory="8GiB",
    least_s=40,
    limit_s=60,
)  # fmt: skip
_OPT_67B = Case(
    "opt-6.7b",
    "opt-6.7b",
    Policy(8, 1, 2048),
    max_tokens=32,
    cpu_memory="4GiB",
    least_s=30,
    limit_s=45,
)
_OPT_30B_4BIT = Case(
    "opt-30b-4bit",
    "opt-30b",
    Policy(
        48, 8, 512, Placement(0.75, 0.25, 0), _CPU, _GPU, cpu_attention=0.21,
        weight_bits=4, cache_bits=4,
    ),
    max_tokens=6,
    cpu_memory="90GiB",
    least_s=80,
    limit_s=130,
)  # fmt: skip

# In the order in which they run; the last one after the calibration.
FIRST_CASES = (
    _OPT_30B,
    _OPT_67B_4BIT,
    _OPT_67B,
    replace(_OPT_67B, name="opt-6.7b-cudnn", allows_cudnn=True),
)
LAST_CASES = (_OPT_30B_4BIT,)
CASES = FIRST_CASES + LAST_CASES


def cases(is_tiny: bool) -> list[Case]:
    """All cases in the order in which they run."""
    return [case.tiny() if is_tiny else case for case in CASES]
