"""The front door: `LLM(model).generate(prompts, SamplingParams(...))`.

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

from flexgen_ray.config import Deployment, Faults, HardwareSpec, Policy
from flexgen_ray.engine.backend import execution
from flexgen_ray.engine.engine import Engine, Settings
from flexgen_ray.engine.options import ELSEWHERE, ELSEWHERE_IN_CALLS, check_values, failure_limits
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
from flexgen_ray.names import explains_call, explains_unknown
from flexgen_ray.paths import default_offload_dir, find_description, find_model
from flexgen_ray.planner.stage_policies import StagePolicies
from flexgen_ray.processor import generation_request, scoring_request
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
    """A model ready to generate, larger than the GPU if need be.

    model: a Hugging Face folder, or a name on its hub; with load_format="dummy", which makes
    weights up, also a built-in shape (models/shapes.py). policy: a Policy for every stage,
    StagePolicies, a YAML file of either, or None: planned, or where rates aren't calibrated, the
    tiers are filled from the fastest down. *_memory:
    bytes or `16GiB`; what is free, less a margin, if None. pipeline_parallel_size: the number of
    stages, or auto, one for every GPU. use_ray: run each in a Ray actor, on the cluster at
    `address` (or RAY_ADDRESS), or on one started for this run. max_restarts: times that lost stages
    are replaced there; stall_timeout: seconds without progress after which a stage counts as lost;
    restart_timeout: seconds in which lost stages must start elsewhere, 120 if None, or 600 where
    the cluster may start machines. faults: these three limits as one object, the older form.
    threads: host threads of each stage; its share of the node's cores if None. wait:
    seconds for room on the cluster; 10 if None, or 900 where it may start machines.
    max_model_len: the longest prompt and answer together, in tokens. Weights are then loaded once
    for calls of any length within it, which take as much memory as the longest; if None, a request
    that is longer than those before loads them again. Without a policy, so may a call with more
    prompts, for which a larger block is planned.
    executor: async runs loads, stores, disk and host attention beside the device's work; serial,
    its oracle, gives the same bits. hardware: sum beside the run what its ops should take there;
    "measured" measures this machine's rates first. run_wrapper: run the ops through a function
    named by import path, as benchmarks/emulation.py does to emulate `hardware`. trace: keep every
    op's times, for `write_trace`. lossy: weight_bits, embedding_bits, cache_bits,
    attention_sparsity as in Policy, over what it says.
    on_progress: called with each phase and pass, such as what progress.show_progress yields.
    plan_for: plan by the rates of this hardware preset or file; in a dry run for its memory too.
    max_latency: seconds that a block may take, as a bound for the plan. dry_run: `prepare` plans
    and checks, and loads nothing.

    Raises ValueError or OSError, with the numbers, for what can't work. Use it as a context manager
    or call `close`.
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
    ) -> None:
        check_values(locals())
        lossy: dict[str, int | float | None] = {
            "weight_bits": weight_bits,
            "embedding_bits": embedding_bits,
            "cache_bits": cache_bits,
            "attention_sparsity": attention_sparsity,
        }
        self._is_dummy = load_format == "dummy"
        is_shape = self._is_dummy and not Path(model).exists()
        find = find_description if dry_run else find_model
        self.model = Path(model) if is_shape else find(model)
        name = str(self.model if Path(model).is_dir() else model)
        needs_weights = not (self._is_dummy or dry_run)
        has_weights = needs_weights or any(self.model.glob("*.safetensors"))
        read_config = checkpoint_config if has_weights and not self._is_dummy else load_config
        config = shape_config(str(model)) if is_shape else read_config(self.model)
        self.max_model_len = _limit(max_model_len, config)
        packed = {it: getattr(config, it) for it in ("weight_bits", "embedding_bits")}
        given = StagePolicies.parse(policy)
        self.policies = given and given.compressed(**lossy).with_default_bits(**packed)
        memory = {"gpu": gpu_memory, "cpu": cpu_memory, "disk": disk_memory}
        limits = {
            tier: None if size is None else parse_bytes(size) for tier, size in memory.items()
        }
        settings = Settings(
            weights=None if self._is_dummy else name,
            base=Policy(**packed).compressed(**lossy),
            policies=self.policies,
            dtype=dtype,
            limits=limits,
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
        )
        tokenizer = Tokenizer(self.model, config.vocab_size)
        if dry_run and not tokenizer.exists:
            tokenizer = GuessedTokenizer(self.model, config.vocab_size)
        self._stops = StopStrings(tokenizer)
        config = config.with_end_tokens(tokenizer.eos_token_id)
        super().__init__(config, tokenizer, settings, on_progress)

    @explains_call("generate", ELSEWHERE_IN_CALLS)
    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        errors: OnError = "raise",
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answer every prompt; one output a prompt, in order.

        prompts: one prompt or an iterable of them (list, generator, numpy array, a table's column).
        A prompt is a text, a sequence of token ids, {"prompt": text} or {"prompt_token_ids": ids}.
        sampling_params: for all prompts, or an iterable of one for each; the model's own if None.
        errors: "raise" refuses all if a prompt can't be answered (ValueError, with its index);
        "return" gives an output with `.error` for it, and answers the others. A request that fails
        during the run, as its activations become NaN or infinite, has `.error` in any case, and a
        warning says so.
        use_tqdm: show the progress on standard error, as a bar on a terminal, else in plain lines.
        """
        several = several_prompts(prompts)
        with self._shown(use_tqdm):
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
        """Answer every chat, formatted with the model's chat template; one output a chat, in order.

        messages: a list of {"role": ..., "content": ...}, or an iterable of such lists.
        sampling_params, errors, use_tqdm: as for `generate`; but where neither sampling_params nor
        the model sets max_tokens, it is None. add_generation_prompt: end with what
        begins an answer; the default, unless the final message is continued.
        continue_final_message: let the answer go on with the final message. tools: functions that
        the model may call, as OpenAI describes them; calls are part of the answer's text.
        chat_template_kwargs: variables for the template, such as {"enable_thinking": False}.
        """
        variables = chat_template_kwargs or {}
        options = ChatOptions(tools, add_generation_prompt, continue_final_message, variables)

        def request(index: int, chat: object, params: SamplingParams) -> Request:
            return self.request(
                index, self.tokenizer.encode_chat(parse_messages(chat), options), params
            )

        chats = several_chats(messages)
        with self._shown(use_tqdm):
            params = sampling_params
            if params is None:
                params = self._default_params(max_tokens=None)
            return self._answer("chats", chats, params, request, errors)

    @contextmanager
    def _shown(self, wanted: bool) -> Iterator[None]:
        """Progress goes to standard error until the block ends, if wanted."""
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
        self.check_usable()
        own = self.get_default_sampling_params() if sampling_params is None else sampling_params
        params = several_params(own, len(items), what)
        self.tokenizer.check()
        told = track(items, self.on_progress, "tokenizing", what, len(items))
        requests, outputs = make_requests(what, told, params, make, errors)
        self.prepare(requests)
        answered = list(self.stream(requests))
        _warn_of_failed(answered)
        outputs += answered
        texts = map(text_of, items)
        outputs.sort(key=lambda output: output.index)
        return [replace(it, prompt=text) for it, text in zip(outputs, texts, strict=True)]

    def _token_ids(self, prompt: Prompt) -> list[int]:
        parsed = parse_prompt(prompt)
        if parsed.token_ids is None:
            return self.tokenizer.encode(parsed.text or "")
        return parsed.token_ids

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json says, and the usual for the rest."""
        return self._default_params()

    def _default_params(self, **unless: Any) -> SamplingParams:
        """unless: values of parameters that the model doesn't set."""
        return SamplingParams(
            **unless | ({} if self._is_dummy else load_sampling_defaults(self.model))
        )

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, transformers' own. ValueError if the folder has none."""
        return self.tokenizer.hf

    def request(self, index: int, prompt: Prompt, params: SamplingParams) -> Request:
        """A request that will fit the model; ValueError says why it can't.

        An answer that would outgrow the context ends there, with finish_reason "length".
        """
        token_ids = self._token_ids(prompt)
        self.check_stops(params.stop)
        bad_words = tuple(chain.from_iterable(map(self.tokenizer.bad_word, params.bad_words)))
        limit = self.max_model_len
        return generation_request(index, token_ids, params, self.config, limit, bad_words)

    def check_stops(self, stops: Sequence[str]) -> None:
        """ValueError for stop strings that no answer of the model can contain."""
        if stops and not self.tokenizer.exists:
            raise ValueError(f"stop strings need a tokenizer, which {self.model} lacks")
        self._stops.check(stops)

    def score_request(
        self, index: int, prompt: Prompt, first: int, in_decode: bool = False
    ) -> Request:
        """A request that doesn't generate: its output has the `scores` of tokens from `first` on.

        in_decode: these are fed one by one, and show what decoding does; else they are prefilled.
        ValueError says why it doesn't fit the model.
        """
        token_ids = self._token_ids(prompt)
        return scoring_request(index, token_ids, first, in_decode, self.config, self.max_model_len)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _limit(max_model_len: int | None, config: ModelConfig) -> int:
    """Tokens that a prompt and its answer may have together; ValueError above the context."""
    if max_model_len is not None and max_model_len > config.max_seq_len:
        raise ValueError(
            f"max_model_len is {max_model_len}, but the model's context is {config.max_seq_len} "
            "tokens; lower it"
        )
    return max_model_len or config.max_seq_len


def _warn_of_failed(outputs: list[RequestOutput]) -> None:
    """One warning for all requests that failed during the run."""
    failed = sorted((it for it in outputs if it.error), key=lambda it: it.index)
    if failed:
        first = f"request {failed[0].index}: {failed[0].error}"
        told = f"{len(failed)} of {len(outputs)} requests failed; {first}"
        warnings.warn(told, stacklevel=5)
