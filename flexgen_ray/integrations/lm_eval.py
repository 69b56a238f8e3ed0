"""The model `flexgen_ray` for lm-evaluation-harness: its tasks, answered by an offloaded model.

Importing this module registers the model. All requests of one kind run together, so that large
blocks share each trip of the weights.
"""

from __future__ import annotations

import atexit
import math
import warnings
from collections.abc import Mapping
from typing import Any

# Before this module's own registration: lm_eval registers its models only in an empty registry.
import lm_eval.models  # noqa: F401
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    has_bos_prefix,
    maybe_truncate,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from flexgen_ray.evaluation.run import run_requests
from flexgen_ray.llm import LLM
from flexgen_ray.request import SamplingParams
from flexgen_ray.text.messages import ChatOptions

MAX_NEW_TOKENS = 256  # for tasks that set no limit
# (texts of context and continuation, tokens of the context, tokens of the continuation)
Pair = tuple[Any, list[int], list[int]]

# Fields of a task's generation_kwargs: those that SamplingParams has too, those that are accepted
# with a neutral value only, and those that are handled by themselves.
_SAMPLING = (
    "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "min_tokens", "stop_token_ids", "ignore_eos",
)  # fmt: skip
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "early_stopping": False}
_SETTLED = {"until", "do_sample", "max_gen_toks", "temperature", "pad_token_id"}


@register_model("flexgen_ray")
class FlexGenRay(TemplateLM):
    """An LLM behind the interface of lm-evaluation-harness.

    pretrained: model folder, or name on the Hugging Face hub.
    batch_size, max_batch_size: ignored; the policy decides.
    max_length: most tokens of a request, LLM's max_model_len.
    add_bos_token: begin texts with the BOS token or not; None follows the tokenizer.
    enable_thinking: variable for the chat template, if not None.
    think_end_token: text that ends the thoughts; the answer is what follows it.
    options: other arguments of LLM, such as policy, dtype and gpu_memory.
    Raises ValueError or TypeError, naming the option, for invalid options.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        flags = {"add_bos_token": add_bos_token, "enable_thinking": enable_thinking}
        for name, value in flags.items():
            if not isinstance(value, bool | None):
                raise ValueError(f"{name} is {value!r}; it must be True, False or None")
        if enable_thinking and not isinstance(think_end_token, str):
            raise ValueError(
                "enable_thinking is True, which needs the text that ends the thoughts, such as "
                "think_end_token=</think>"
            )
        self._add_bos_token = add_bos_token
        self._think_end_token = think_end_token
        self._template = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        if max_length is not None:
            options["max_model_len"] = max_length
        self.llm = LLM(pretrained, device=device or "auto", **options)
        # The harness doesn't close its models.
        atexit.register(self.llm.close)
        self.tokenizer = self.llm.tokenizer.hf

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Token that stands for an empty context: BOS, or the end token if there is no BOS."""
        beginning = self.tokenizer.bos_token_id
        return self.eot_token_id if beginning is None else beginning

    @property
    def max_length(self) -> int:
        return self.llm.max_model_len

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a chat as text. Raises ValueError if the model's chat template refuses it.

        If it is refused with system messages, they are left out with a warning, as in the harness's
        own models.
        """
        options = ChatOptions(
            None, add_generation_prompt, not add_generation_prompt, self._template
        )
        try:
            return self.llm.tokenizer.format_chat(chat_history, options)
        except ValueError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            warnings.warn(f"{error}; system messages are left out", stacklevel=2)
            return self.llm.tokenizer.format_chat(others, options)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return a text's token ids; a text that begins with the BOS token gets no second one."""
        if add_special_tokens is not None:
            return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        has_bos = has_bos_prefix(string, self.tokenizer.bos_token)
        adds = not has_bos and self._add_bos_token is not False
        token_ids = self.tokenizer.encode(string, add_special_tokens=adds)
        bos = self.tokenizer.bos_token_id
        if self._add_bos_token and bos is not None and token_ids[:1] != [bos]:
            return [bos, *token_ids]
        return token_ids

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of each whole text, scored in windows as long as the context.

        Each text follows the prefix token. A BOS token that the tokenizer adds isn't scored.
        """
        pairs: list[Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            token_ids = self.tok_encode(request.args[0])
            if token_ids[:1] == [self.prefix_token_id]:
                token_ids = token_ids[1:]
            windows = get_rolling_token_windows(
                token_ids, self.prefix_token_id, self.max_length, context_len=1
            )
            for window in windows:
                pairs.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(pairs)
        for owner, (logprob, _) in zip(owners, scored, strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **others: Any
    ) -> list[tuple[float, bool]]:
        """Return (log-probability, is it the greedy choice) of each pair's continuation.

        A pair that is longer than the context loses its beginning.
        """
        made = []
        for index, (_, context, continuation) in enumerate(requests):
            # The last token is only scored: it needs no place in the context.
            token_ids = (context + continuation)[-self.max_length - 1 :]
            first = max(len(token_ids) - len(continuation), 1)
            made.append(self.llm.score_request(index, token_ids, first))
        results = []
        for (texts, _, _), output in zip(requests, run_requests(self.llm, made), strict=True):
            is_greedy = all(it.rank == 1 for it in output.scores)
            result = math.fsum(it.logprob for it in output.scores), is_greedy
            results.append(result)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return a generated text for each request, cut at its stop strings."""
        made, stops = [], []
        for index, request in enumerate(requests):
            text, asked = request.args
            wanted = normalize_gen_kwargs(asked, MAX_NEW_TOKENS)
            stops.append([stop for stop in wanted["until"] if stop])
            token_ids, max_tokens = maybe_truncate(
                self.tok_encode(text), wanted["max_gen_toks"], self.max_length
            )
            params = _params(wanted, max_tokens, stops[-1])
            made.append(self.llm.request(index, token_ids, params))
        texts = []
        for request, stop, output in zip(
            requests, stops, run_requests(self.llm, made), strict=True
        ):
            text = output.outputs[0].text
            texts.append(postprocess_generated_text(text, stop, self._think_end_token))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts


def _params(wanted: Mapping[str, Any], max_tokens: int, stop: list[str]) -> SamplingParams:
    """Return a task's normalized generation_kwargs as SamplingParams.

    Raises ValueError, naming the field, for one that isn't supported.
    """
    for name, value in wanted.items():
        is_neutral = name in _NEUTRAL and value in (_NEUTRAL[name], None)
        if name not in _SETTLED and name not in _SAMPLING and not is_neutral:
            raise ValueError(
                f"the task's generation_kwargs have {name} {value!r}, which is not supported; "
                f"supported are {', '.join(_SAMPLING)}, temperature, do_sample and until"
            )
    own = {name: wanted[name] for name in _SAMPLING if wanted.get(name) is not None}
    temperature = wanted.get("temperature", 1.0 if wanted["do_sample"] else 0.0)
    return SamplingParams(max_tokens=max_tokens, temperature=temperature, stop=stop, **own)
