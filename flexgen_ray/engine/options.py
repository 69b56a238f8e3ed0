"""Options of LLM: the values they take, and the names that options of other systems have here.

Values are checked before anything is read or started. Knows no model and no machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from sys import float_info
from typing import Any

from flexgen_ray.checks import Check, instance, integer, number, one_of, optional
from flexgen_ray.config import (
    DEVICES,
    DTYPE_BYTES,
    PAGE_TOKENS,
    TRANSPORTS,
    Faults,
    HardwareSpec,
    Policy,
    is_device,
)
from flexgen_ray.planner.stage_policies import StagePolicies
from flexgen_ray.runtime.modelled import RunWrapper
from flexgen_ray.runtime.stage import EXECUTORS
from flexgen_ray.units import parse_bytes

_BY_POLICY = "the policy sets it (gpu_batch_size, num_gpu_batches); without one it is planned"
_BUDGETS = (
    "give budgets in bytes: gpu_memory, cpu_memory and disk_memory, such as gpu_memory='16GiB'"
)
_REVISION = (
    "fetch that revision into a folder (hf download --revision) and give the folder as model"
)
_FOLDER = "the tokenizer is read from the model's folder; put its files there"
_NEVER_REMOTE = "code from a model's folder is never run; leave it out"
_PAGE_SIZE = f"a page of the KV cache always has {PAGE_TOKENS} tokens; leave it out"
_EMULATION = "hardware is emulated by benchmarks/emulation.py, in a checkout"

# Options of vLLM's LLM and of Hugging Face that have another name here, or none: the remedy.
ELSEWHERE: Mapping[str, str] = {
    "tensor_parallel_size": "use pipeline_parallel_size; GPUs get different layers, matrices are "
    "never split",
    "data_parallel_size": "start a run for each part of the input",
    "distributed_executor_backend": "use use_ray=True or use_ray=False",
    "gpu_memory_utilization": _BUDGETS,
    "swap_space": _BUDGETS,
    "pace": _EMULATION,
    "time_scale": _EMULATION,
    "cpu_offload_gb": _BUDGETS,
    "kv_cache_memory_bytes": _BUDGETS,
    "kv_cache_dtype": "use cache_bits=4 or 8 to quantize the KV cache",
    "quantization": "use weight_bits=4 or 8; of checkpoints that others quantized only "
    "gpt-oss's, in MXFP4, can be loaded",
    "load_in_4bit": "use weight_bits=4",
    "load_in_8bit": "use weight_bits=8",
    "enforce_eager": "there are no CUDA graphs here; leave it out",
    "max_seq_len_to_capture": "there are no CUDA graphs here; leave it out",
    "compilation_config": "there are no CUDA graphs here; leave it out",
    "max_num_seqs": _BY_POLICY,
    "max_num_batched_tokens": "a policy's max_batch_tokens sets it",
    "enable_chunked_prefill": "long prompts are always cut by the policy's max_batch_tokens; leave "
    "it out",
    "block_size": _PAGE_SIZE,
    "prefix_caching_hash_algo": "prompts are compared token by token; leave it out",
    "trust_remote_code": _NEVER_REMOTE,
    "tokenizer": _FOLDER,
    "tokenizer_mode": _FOLDER,
    "tokenizer_revision": _REVISION,
    "skip_tokenizer_init": "a folder without a tokenizer takes token ids; leave it out",
    "revision": _REVISION,
    "code_revision": _NEVER_REMOTE,
    "download_dir": "set the environment variable HF_HUB_CACHE",
    "hf_token": "log in (hf auth login), or set the environment variable HF_TOKEN",
    "hf_overrides": "change config.json in the model's folder",
    "torch_dtype": "use dtype",
    "device_map": "a policy says where weights, cache and activations lie",
    "offload_folder": "use offload_dir",
    "enable_lora": "adapters can't be loaded; merge the adapter into the model's weights first",
    "speculative_config": "there is no speculative decoding here; leave it out",
    "speculative_model": "there is no speculative decoding here; leave it out",
    "disable_log_stats": "use use_tqdm=False in generate to run without progress",
    "generation_config": "give SamplingParams to generate; the model's own are their default",
    "attention_backend": "the kernel is chosen by measurement; leave it out",
    "chat_template": "put chat_template.jinja into the model's folder",
    "num_stages": "use pipeline_parallel_size",
    "stages": "use pipeline_parallel_size",
    "sparsity": "use attention_sparsity",
    "no_ray": "use use_ray=False",
    "dummy_weights": 'use load_format="dummy"',
}  # fmt: skip

# Options of vLLM's generate and chat that have another name here, or none: the remedy.
ELSEWHERE_IN_CALLS: Mapping[str, str] = {
    "prompt_token_ids": "give token ids as prompts",
    "prompt": "use prompts",
    "params": "use sampling_params",
    "lora_request": ELSEWHERE["enable_lora"],
    "priority": "requests are answered in an order that fills every pass; leave it out",
    "guided_options_request": "answers can't be held to a grammar here; say the form in the prompt",
    "chat_template": ELSEWHERE["chat_template"],
    "chat_template_content_format": "a message's content is a text, or parts of text; leave it out",
    "mm_processor_kwargs": "only text is supported",
    "max_tokens": "give SamplingParams(max_tokens=...)",
    "temperature": "give SamplingParams(temperature=...)",
    "enable_thinking": 'use chat_template_kwargs={"enable_thinking": ...}',
}


def failure_limits(
    max_restarts: int, stall_timeout: float, restart_timeout: float | None, faults: Faults | None
) -> Faults:
    """Limits on failures, from their own options or from `faults`, the older form.

    Raises ValueError if both are given.
    """
    limits = Faults(max_restarts, stall_timeout, restart_timeout)
    if faults is None:
        return limits
    if limits != Faults():
        raise ValueError(
            "give max_restarts, stall_timeout and restart_timeout, or faults=Faults(...), not both"
        )
    return faults


def _is_size(value: Any) -> bool:
    if not isinstance(value, str):
        return value is None or _from_0(value)
    try:
        return parse_bytes(value) >= 0
    except ValueError:
        return False


_NONE = type(None)
_from_0 = integer(0, numpy=True)
_from_1 = integer(1, numpy=True)
_above_0 = number(0, float_info.max, above=True)
_FLAG: Check = instance(bool), "True or False"
_SIZE: Check = _is_size, 'a size such as "16GiB", a number of bytes, or None for what is free'
CHECKS: dict[str, Check] = {
    "model": (lambda value: isinstance(value, str | PathLike) and str(value) != "",
              "a folder, or a name on the Hugging Face hub"),
    "policy": (instance(_NONE, Policy, StagePolicies, str, PathLike),
               "a Policy, StagePolicies, a YAML file's path, or None"),
    "dtype": one_of("auto", *DTYPE_BYTES),
    "device": (is_device, DEVICES),
    "gpu_memory": _SIZE,
    "cpu_memory": _SIZE,
    "disk_memory": _SIZE,
    "offload_dir": (instance(_NONE, str, PathLike), "a folder, or None for the user's cache"),
    "pipeline_parallel_size": (lambda value: value == "auto" or _from_1(value),
                               '"auto" or a number of stages, from 1 up'),
    "use_ray": _FLAG,
    "address": (instance(_NONE, str), "a Ray cluster's address, or None"),
    "transport": one_of(*TRANSPORTS),
    "max_restarts": (_from_0, "a number from 0 up"),
    "stall_timeout": (_above_0, "a number of seconds above 0"),
    "restart_timeout": (optional(_above_0), "None or a number of seconds above 0"),
    "faults": (instance(_NONE, Faults), "Faults(...) or None"),
    "seed": (integer(numpy=True), "an integer"),
    "executor": one_of(*EXECUTORS),
    "hardware": (lambda value: value == "measured" or isinstance(value, HardwareSpec | None),
                 'a HardwareSpec, "measured" or None'),
    "run_wrapper": (instance(_NONE, RunWrapper), "a RunWrapper or None"),
    "trace": _FLAG,
    "max_model_len": (optional(_from_1), "None or a number of tokens"),
    "threads": (optional(_from_1), "None or a number from 1 up"),
    "wait": (optional(number(0)), "None or a number of seconds, from 0 up"),
    "on_progress": (callable, "a function, such as what progress.show_progress yields"),
    "load_format": one_of("auto", "dummy"),
    "plan_for": (instance(_NONE, str, PathLike),
                 "a hardware preset's name, a file's path, or None"),
    "max_latency": (optional(_above_0), "None or seconds, above 0"),
    "dry_run": _FLAG,
    "enable_prefix_caching": _FLAG,
}  # fmt: skip
