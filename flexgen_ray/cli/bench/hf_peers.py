"""Peers that run a transformers model: in memory, by accelerate or AirLLM, or with ZeRO stage 3.

Knows how to set each one up at its best; expects that its package is installed.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from contextlib import redirect_stdout

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from flexgen_ray.cli.bench.peer_task import PeerTask


class HuggingFace:
    """Runs `generate` of a transformers model, batch by batch, with padding on the left.

    Prompts are batched in order of length, which needs the least padding. on_pass: called before
    each token but the first. details: facts about the set-up, for the result.
    """

    def __init__(
        self, model: PreTrainedModel, batch_size: int, device: torch.device, details: dict
    ) -> None:
        self.model = model.eval()
        self.batch_size = batch_size
        self.device = device
        self.details = details
        # The checkpoint's own end tokens and sampling would otherwise be merged into each call.
        self.model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)

    def generate(
        self, prompts: list[list[int]], max_tokens: int, on_pass: Callable[[], None] | None
    ) -> list[list[int]]:
        """Greedy tokens of each prompt, in the prompts' order."""
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        tokens: dict[int, list[int]] = {}
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            answers = self._batch([prompts[row] for row in rows], max_tokens, on_pass)
            tokens |= dict(zip(rows, answers, strict=True))
        return [tokens[index] for index in range(len(prompts))]

    def _batch(
        self, prompts: list[list[int]], max_tokens: int, on_pass: Callable[[], None] | None
    ) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor(
            [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        )

        def between(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if on_pass:
                on_pass()
            return scores

        with torch.inference_mode():
            out = self.model.generate(
                ids.to(self.device),
                attention_mask=mask.to(self.device),
                max_new_tokens=max_tokens,
                do_sample=False,
                logits_processor=[between],
            )
        return out[:, longest:].tolist()


def resident(work: PeerTask, batch_size: int, device: torch.device) -> HuggingFace:
    """Peer with all weights on the device."""
    model = _load(work)
    model.to(device)  # type: ignore[arg-type]  # a decorator hides the method's self
    return HuggingFace(model, batch_size, device, {})


def accelerate_cpu(work: PeerTask, batch_size: int, device: torch.device) -> HuggingFace:
    """Peer with weights in host memory, which accelerate's hooks copy to the device by module."""
    from accelerate import cpu_offload

    model = cpu_offload(_load(work), execution_device=device)
    return HuggingFace(model, batch_size, device, {"weights": "host memory"})


def accelerate_disk(work: PeerTask, batch_size: int, device: torch.device) -> HuggingFace:
    """Peer with weights on disk, which accelerate's hooks read by module when it runs.

    They are read from the checkpoint itself if it has the dtype, else from a converted copy.
    """
    from accelerate import disk_offload, init_empty_weights

    config = AutoConfig.from_pretrained(work.model)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, work.dtype), attn_implementation="sdpa"
        )
    model.tie_weights()
    source = _offload_index(model, work)
    disk_offload(model, work.scratch, execution_device=device)
    return HuggingFace(model, batch_size, device, {"weights": source})


def airllm(work: PeerTask, batch_size: int, device: torch.device) -> HuggingFace:
    """AirLLM, which reads a layer when it runs, and the next one meanwhile, from a copy in pieces.

    The pieces are written beside the offload files when it is loaded.
    """
    from airllm.airllm_base import AirLLMBaseModel

    # AirLLM would run the folder's own code where this refuses to.
    AutoConfig.from_pretrained(work.model, trust_remote_code=False)

    class Streamed(AirLLMBaseModel):
        """AirLLM without a tokenizer, which it would read with remote code allowed."""

        def get_tokenizer(self, hf_token: str | None = None) -> None:
            return None

    dtype = getattr(torch, work.dtype)
    with redirect_stdout(sys.stderr):
        streamed = Streamed(
            work.model, str(device), dtype=dtype, layer_shards_saving_path=work.scratch
        )
    return HuggingFace(streamed.model, batch_size, device, {"weights": "a copy of each layer"})


def deepspeed_cpu(work: PeerTask, batch_size: int, device: torch.device) -> HuggingFace:
    """DeepSpeed's ZeRO-Inference: stage 3 with its parameters in host memory."""
    offload = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return _deepspeed(work, batch_size, device, offload)


def deepspeed_nvme(work: PeerTask, batch_size: int, device: torch.device) -> HuggingFace:
    """DeepSpeed's ZeRO-Inference: stage 3 with its parameters in files; needs libaio."""
    config = AutoConfig.from_pretrained(work.model)
    offload = {
        "device": "nvme",
        "nvme_path": work.scratch,
        "pin_memory": device.type == "cuda",
        "buffer_count": 8,
        # A buffer must hold the largest tensor.
        "buffer_size": config.vocab_size * config.hidden_size,
    }
    return _deepspeed(work, batch_size, device, offload)


PEERS = {
    "transformers": resident,
    "accelerate-cpu": accelerate_cpu,
    "accelerate-disk": accelerate_disk,
    "airllm": airllm,
    "deepspeed-cpu": deepspeed_cpu,
    "deepspeed-nvme": deepspeed_nvme,
}


def _load(work: PeerTask) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        work.model,
        dtype=getattr(torch, work.dtype),
        attn_implementation="sdpa",
        local_files_only=True,
    )


def _offload_index(model: PreTrainedModel, work: PeerTask) -> str:
    """Write accelerate's index of the model's tensors; returns a phrase for where they lie."""
    from accelerate.utils import offload_weight, save_offload_index
    from safetensors import safe_open

    wanted = set(model.state_dict())
    tied = dict(model.all_tied_weights_keys)
    index: dict[str, dict] = {}
    copied = False
    for path in work.model_files():
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                # Checkpoints of the bare model lack its prefix.
                name = key if key in wanted else f"{model.base_model_prefix}.{key}"
                tensor = file.get_tensor(key)
                if tensor.dtype != model.dtype:
                    offload_weight(tensor.to(model.dtype), name, work.scratch, index)
                    copied = True
                else:
                    index[name] = {"safetensors_file": str(path), "weight_name": key}
    for name, source in tied.items():
        if name not in index:
            index[name] = index[source]
            if copied:
                os.link(f"{work.scratch}/{source}.dat", f"{work.scratch}/{name}.dat")
    save_offload_index(index, work.scratch)
    return "a copy in the dtype" if copied else "the checkpoint"


def _deepspeed(work: PeerTask, batch_size: int, device: torch.device, offload: dict) -> HuggingFace:
    """Peer under ZeRO stage 3, in its own process group; offload: DeepSpeed's offload_param."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "fp16": {"enabled": work.dtype == "float16"},
        "bf16": {"enabled": work.dtype == "bfloat16"},
        "zero_optimization": {
            "stage": 3,
            "offload_param": offload,
            "stage3_param_persistence_threshold": 0,
        },
    }
    # transformers partitions weights while it loads them as long as this object lives.
    alive = HfDeepSpeedConfig(config)
    engine = deepspeed.initialize(model=_load(work), config=config)[0]
    engine.module._deepspeed = (alive, engine)
    return HuggingFace(engine.module, batch_size, device, {"offload_param": offload["device"]})
