"""`LLM`, the class that Python users start from: `LLM(model).generate(prompts, params)`.

Checks options, turns prompts into requests, and gives them to the engine. Knows text; no tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen_ray.checks import check_values, explains_call, explains_unknown
from flexgen_ray.config import LOSSY, Deployment, Faults, HardwareSpec, Policy
from flexgen_ray.engine.backend import execution
from flexgen_ray.engine.engine import Engine, Settings
from flexgen_ray.engine.options import CHECKS, ELSEWHERE, ELSEWHERE_IN_CALLS, failure_limits
from flexgen_ray.engine.prompts import (
    Chat,
    Make,
    OnError,
    Prompt,
    make_requests,
    parse_prompt,
    several_chats,
    several_params,
    several_prompts,
    text_of,
)
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.models.checkpoint import checkpoint_config
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.models.config_files import load_config, load_sampling_defaults
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.paths import default_offload_dir, find_description, find_model
from flexgen_ray.planner.stage_policies import StagePolicies
from flexgen_ray.processor import generation_request, scoring_request
from flexgen_ray.quant.formats import WeightFormat
from flexgen_ray.reporting.progress import show_progress, track
from flexgen_ray.request import Request, RequestOutput, SamplingParams
from flexgen_ray.runtime.events import OnProgress, ignore_progress
from flexgen_ray.runtime.modelled import RunWrapper
from flexgen_ray.text.messages import ChatOptions, parse_messages
from flexgen_ray.text.stop_strings import StopStrings
from flexgen_ray.text.tokenizer import GuessedTokenizer, Tokenizer
from flexgen_ray.units import parse_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@explains_unknown(ELSEWHERE)
class LLM(Engine):
    """A model that generates text, which may be larger than the memory of the GPUs.

    Use it as a context manager, or call `close`. Weights are loaded with the first prompts, which
    decide the plan, and stay loaded for later calls. All arguments but `model` are passed by name.

    Model

    model: folder in Hugging Face's format (safetensors), or a name on its hub, such as
        "Qwen/Qwen3-32B". With load_format="dummy" also a built-in shape, such as "opt-30b".
    dtype: "float32", "float16" or "bfloat16". "auto" (the default) is the checkpoint's dtype on a
        GPU (float16 in place of bfloat16 where the GPU has no fast bfloat16); on a CPU float32, or
        bfloat16 if the checkpoint has it and the CPU is fast in it.
    load_format: "auto" (the default) loads the model's files; "dummy" makes random weights, to
        measure speed without a checkpoint.
    max_model_len: limit on the tokens of a prompt and its answer together. Memory is then planned
        for that length, and weights are loaded once for all calls. None (the default) is the
        model's context, with memory for the longest request; a longer request, or without a policy
        a larger number of requests, may load the weights again. It also chooses longrope's
        factors.
    seed: seed of the random numbers, 0 by default; equal seeds give equal answers.

    Placement and memory

    policy: Policy for every stage, StagePolicies, or the path of a YAML file with either. None (the
        default) plans one for the highest throughput if the hardware's rates are known (calibrated,
        or a preset of its GPU); else memory is filled, fastest tier first.
    device: "auto" (the default), "cpu", "cuda", or "cuda:1" for the second GPU.
    gpu_memory: GPU memory budget of each stage, in bytes or as text such as "16GiB". None (the
        default) is 90% of what is free.
    cpu_memory: host memory budget of each machine, in the same forms; None is 80% of what is free.
    disk_memory: disk space budget of each machine; None is 90% of what is free.
    offload_dir: folder for data on disk. None is flexgen_ray/offload in the user's cache folder.
    threads: host threads of each stage. None is OMP_NUM_THREADS, else the stage's share of the
        node's cores.
    plan_for: hardware preset or YAML file whose rates the plan uses; None is this machine's.
    max_latency: limit on the planned seconds of a block of requests; None is no limit.
    enable_prefix_caching: compute what several prompts begin with, and the prompt of `n` answers,
        once for all of them (the default), or with each.

    Quantization and sparsity: lossy, off by default, and in place of the policy's own values

    weight_bits, embedding_bits, cache_bits: 4 or 8 bits for the layers' weights, for the embedding
        and the head, and for the KV cache.
    attention_sparsity: share of each sequence's tokens that decoding attends to, above 0 up to 1.

    Pipeline and Ray cluster

    pipeline_parallel_size: number of stages, each with its share of the layers; 1 by default.
        "auto" is one stage for every GPU of the cluster.
    use_ray: run each stage in a Ray actor (the default), or all stages in this process.
    address: address of the Ray cluster, such as "10.0.0.5:6379". None is RAY_ADDRESS, else a
        cluster on this machine that is started for this process.
    wait: seconds to wait for free resources on the cluster. None is 10, or 900 where the cluster
        may start machines.
    transport: "nccl" or "gloo" sends hidden states between stages; "auto" (the default) is nccl if
        every stage has a GPU.
    max_restarts: number of times that lost stages are replaced before a run fails; 3 by default.
    stall_timeout: seconds without progress after which stages count as lost; 300 by default.
    restart_timeout: seconds for lost stages to start again. None is 120, or 600 where the cluster
        may start machines.
    faults: these three limits as Faults(...), an older form.

    Running and measuring

    executor: "async" (the default) overlaps transfers, host attention and the device's work;
        "serial" runs one op after the other, with the same results bit for bit.
    on_progress: function that is called with each Progress, such as a pass or a phase of loading.
    dry_run: plan and check only; `prepare` loads nothing, and there are no answers.
    trace: keep the times of every op for `write_trace`; False by default.
    hardware: rates by which the report predicts each op's time. "measured" measures this machine
        before weights are loaded; None (the default) takes the plan's, if it was planned by rates.
    run_wrapper: function through which each stage runs its ops, named by import path; for
        benchmarks that emulate hardware.

    Raises ValueError or OSError, with the numbers, for what can't work, before weights are loaded.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        policy: Policy | StagePolicies | str | Path | None = None,
        dtype: str = "auto",
        device: str = "auto",
        gpu_memory: str | int | None = None,
        cpu_memory: str | int | None = None,
        disk_memory: str | int | None = None,
        offload_dir: str | Path | None = None,
        pipeline_parallel_size: int | str = 1,
        use_ray: bool = True,
        address: str | None = None,
        transport: str = "auto",
        max_restarts: int = 3,
        stall_timeout: float = 300.0,
        restart_timeout: float | None = None,
        faults: Faults | None = None,
        threads: int | None = None,
        wait: float | None = None,
        max_model_len: int | None = None,
        seed: int = 0,
        executor: str = "async",
        hardware: HardwareSpec | str | None = None,
        run_wrapper: RunWrapper | None = None,
        trace: bool = False,
        load_format: str = "auto",
        weight_bits: int | None = None,
        embedding_bits: int | None = None,
        cache_bits: int | None = None,
        attention_sparsity: float | None = None,
        on_progress: OnProgress = ignore_progress,
        plan_for: str | Path | None = None,
        max_latency: float | None = None,
        dry_run: bool = False,
        enable_prefix_caching: bool = True,
    ) -> None:
        options = dict(locals())
        check_values(options, CHECKS)
        lossy = {name: options[name] for name in LOSSY}
        self._is_dummy = load_format == "dummy"
        self.model, config = _find_model(model, self._is_dummy, dry_run)
        self.max_model_len = _context_limit(max_model_len, config)
        config = config.within(self.max_model_len)
        stored_bits = {name: getattr(config, name) for name in ("weight_bits", "embedding_bits")}
        policies = StagePolicies.parse(policy)
        self.policies = policies and policies.compressed(**lossy).with_default_bits(**stored_bits)
        base = Policy(**stored_bits).compressed(**lossy)
        for each in self.policies.policies if self.policies else (base,):
            WeightFormat(config.dtype, each.weight_bits, each.embedding_bits, config.expert_format)
        memory = {"gpu": gpu_memory, "cpu": cpu_memory, "disk": disk_memory}
        name = str(self.model if Path(model).is_dir() else model)
        settings = Settings(
            weights=None if self._is_dummy else name,
            base=base,
            policies=self.policies,
            dtype=dtype,
            limits={
                tier: None if size is None else parse_bytes(size) for tier, size in memory.items()
            },
            offload_dir=Path(offload_dir or default_offload_dir()).resolve(),
            deployment=Deployment(
                num_stages=pipeline_parallel_size,
                device=device,
                use_ray=use_ray,
                address=address,
                transport=transport,
                faults=failure_limits(max_restarts, stall_timeout, restart_timeout, faults),
                threads=threads,
                wait_seconds=wait,
            ),
            seed=int(seed),
            execution=execution(executor, hardware, run_wrapper, trace),
            measures=hardware == "measured",
            hardware=None if plan_for is None else Hardware.load(plan_for),
            max_seconds=max_latency,
            is_dry=dry_run,
            max_model_len=max_model_len,
            shares_prefixes=enable_prefix_caching,
        )
        tokenizer = Tokenizer(self.model, config.vocab_size)
        if dry_run and not tokenizer.exists:
            tokenizer = GuessedTokenizer(self.model, config.vocab_size)
        self._stops = StopStrings(tokenizer)
        config = config.with_end_tokens(tokenizer.eos_token_id)
        super().__init__(config, tokenizer, settings, on_progress)
        self._note(_note_of_long_rope(config, self.max_model_len))

    @explains_call("generate", ELSEWHERE_IN_CALLS)
    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        errors: OnError = "raise",
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answer every prompt; returns one output a prompt, in the order of the prompts.

        prompts: one prompt, or an iterable of prompts (list, generator, numpy array, a table's
            column). A prompt is a text, a sequence of token ids, {"prompt": text} or
            {"prompt_token_ids": ids}.
        sampling_params: SamplingParams for all prompts, or an iterable with one for each. None (the
            default) is the model's generation_config.json.
        errors: "raise" (the default) raises ValueError, with its index, for the first prompt that
            can't be answered, before any is; "return" gives such a prompt an output with `.error`
            and answers the others. A request that fails during the run, because its hidden states
            become NaN or infinite, has an output with `.error` in both cases, and a warning is
            shown.
        use_tqdm: show progress on standard error, as a bar on a terminal, else as plain lines.
        """
        several = several_prompts(prompts)
        with self._showing_progress(use_tqdm):
            return self._answer("prompts", several, sampling_params, self.request, errors)

    @explains_call("chat", ELSEWHERE_IN_CALLS)
    def chat(
        self,
        messages: Chat | Iterable[Chat],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        errors: OnError = "raise",
        use_tqdm: bool = False,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer every chat; returns one output a chat, in the order of the chats.

        Chats are formatted with the model's chat template.
        messages: one chat, a list of {"role": ..., "content": ...}, or an iterable of chats.
        sampling_params, errors, use_tqdm: see `generate`. If neither sampling_params nor the
            model's generation_config.json sets max_tokens, it is None: the rest of the context.
        add_generation_prompt: end the prompt with the header of an answer. None (the default) is
            True, unless the final message is continued.
        continue_final_message: let the answer continue the final message; False by default.
        tools: functions that the model may call, as OpenAI describes them; calls are part of the
            answer's text.
        chat_template_kwargs: variables for the template, such as {"enable_thinking": False}.
        """
        variables = chat_template_kwargs or {}
        options = ChatOptions(tools, add_generation_prompt, continue_final_message, variables)

        def request(index: int, chat: object, params: SamplingParams) -> Request:
            return self.request(
                index, self.tokenizer.encode_chat(parse_messages(chat), options), params
            )

        chats = several_chats(messages)
        with self._showing_progress(use_tqdm):
            params = sampling_params
            if params is None:
                params = self._default_params(max_tokens=None)
            return self._answer("chats", chats, params, request, errors)

    @contextmanager
    def _showing_progress(self, wanted: bool) -> Iterator[None]:
        """Context that shows progress on standard error, if wanted."""
        if not wanted:
            yield
            return
        before = self.on_progress
        try:
            with show_progress() as self.on_progress:
                yield
        finally:
            self.on_progress = before

    def _answer(
        self, what: str, items: list, sampling_params: object, make: Make, errors: OnError
    ) -> list[RequestOutput]:
        """Turn items into requests, run them, and sort their outputs by the place of their item.

        what: plural of the items, for progress and errors. make: makes a request of an item.
        """
        self.check_usable()
        own = self.get_default_sampling_params() if sampling_params is None else sampling_params
        params = several_params(own, len(items), what)
        self.tokenizer.check()
        tracked = track(items, self.on_progress, "tokenizing", what, len(items))
        requests, outputs = make_requests(what, tracked, params, make, errors)
        self.prepare(requests)
        answered = list(self.stream(requests))
        _warn_of_failed(answered)
        outputs += answered
        texts = map(text_of, items)
        outputs.sort(key=lambda output: output.index)
        return [replace(output, prompt=text) for output, text in zip(outputs, texts, strict=True)]

    def _token_ids(self, prompt: Prompt) -> list[int]:
        parsed = parse_prompt(prompt)
        if parsed.token_ids is None:
            return self.tokenizer.encode(parsed.text or "")
        return parsed.token_ids

    def get_default_sampling_params(self) -> SamplingParams:
        """Parameters from the model's generation_config.json, with SamplingParams' defaults."""
        return self._default_params()

    def _default_params(self, **unless: Any) -> SamplingParams:
        """Default parameters of the model. unless: values of parameters that it doesn't set."""
        return SamplingParams(
            **unless | ({} if self._is_dummy else load_sampling_defaults(self.model))
        )

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, as transformers loads it; ValueError if the folder has none."""
        return self.tokenizer.hf

    def request(self, index: int, prompt: Prompt, params: SamplingParams) -> Request:
        """Make a request of a prompt; raises ValueError if the model can't answer it.

        index: the request's place in its call. An answer that would outgrow the context ends there,
        with finish_reason "length".
        """
        token_ids = self._token_ids(prompt)
        self.check_stops(params.stop)
        bad_words = tuple(chain.from_iterable(map(self.tokenizer.bad_word, params.bad_words)))
        limit = self.max_model_len
        return generation_request(index, token_ids, params, self.config, limit, bad_words)

    def check_stops(self, stops: Sequence[str]) -> None:
        """Raise ValueError for a stop string that no answer of the model can contain."""
        if stops and not self.tokenizer.exists:
            raise ValueError(f"stop strings need a tokenizer, which {self.model} lacks")
        self._stops.check(stops)

    def score_request(
        self, index: int, prompt: Prompt, first: int, in_decode: bool = False
    ) -> Request:
        """Make a request that generates nothing: its output has `scores` of the prompt's tokens.

        first: place of the first token that is scored, from 1 up. in_decode: feed the scored tokens
        one by one, as decoding does; False prefills them. Raises ValueError if it doesn't fit the
        model.
        """
        token_ids = self._token_ids(prompt)
        return scoring_request(index, token_ids, first, in_decode, self.config, self.max_model_len)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _find_model(model: str | Path, is_dummy: bool, is_dry: bool) -> tuple[Path, ModelConfig]:
    """Folder and config of a model, or the name and config of a built-in shape.

    is_dummy: the weights are made up, so they needn't be there. is_dry: no weights are loaded; they
    needn't be downloaded, but weights that are there are checked.
    """
    if is_dummy and not Path(model).exists():
        return Path(model), shape_config(str(model))
    folder = (find_description if is_dry else find_model)(model)
    has_weights = not is_dry or any(folder.glob("*.safetensors"))
    read_config = checkpoint_config if has_weights and not is_dummy else load_config
    return folder, read_config(folder)


def _context_limit(max_model_len: int | None, config: ModelConfig) -> int:
    """Limit on the tokens of a prompt and its answer; ValueError if it is above the context."""
    if max_model_len is not None and max_model_len > config.max_seq_len:
        raise ValueError(
            f"max_model_len is {max_model_len}, but the model's context is {config.max_seq_len} "
            "tokens; lower it"
        )
    return max_model_len or config.max_seq_len


def _note_of_long_rope(config: ModelConfig, limit: int) -> str | None:
    """Note if longrope's long factors are taken, for short requests too; else None."""
    if config.rope is None or not config.rope.is_long:
        return None
    original = config.rope.original_max_seq_len
    return (
        f"longrope's long factors are used for all requests, for they may have {limit:,} tokens; "
        f"max_model_len {original} takes the short factors, with which the model answers short "
        "requests better"
    )


def _warn_of_failed(outputs: list[RequestOutput]) -> None:
    """Show one warning for all requests that failed during the run."""
    failed = sorted((output for output in outputs if output.error), key=lambda it: it.index)
    if failed:
        first = f"request {failed[0].index}: {failed[0].error}"
        warnings.warn(f"{len(failed)} of {len(outputs)} requests failed; {first}", stacklevel=5)
