"""lm-evaluation-harness's model `flexgen_ray`: its tasks, answered by an offloaded model.

Importing this registers it. Knows what the harness asks for, and an LLM; all requests of a kind are
one job.
"""

from __future__ import annotations

import atexit
import math
import warnings
from collections.abc import Mapping
from typing import Any

# First: a registry with a model in it would be taken to have its own already.
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

MAX_NEW_TOKENS = 256  # where a task doesn't say
Pair = tuple[Any, list[int], list[int]]  # its texts, and the tokens of context and continuation

# Of a task's generation_kwargs: what SamplingParams has too, and what changes no answer.
_SAMPLING = (
    "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "min_tokens", "stop_token_ids", "ignore_eos",
)  # fmt: skip
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "early_stopping": False}
_SETTLED = {"until", "do_sample", "max_gen_toks", "temperature", "pad_token_id"}


@register_model("flexgen_ray")
class FlexGenRay(TemplateLM):
    """An LLM as lm-evaluation-harness asks it.

    pretrained: a model folder, or a name on the hub. options: the other arguments of LLM, such as
    policy, dtype and gpu_memory. batch_size, max_batch_size: ignored, for the policy decides.
    max_length: tokens of a request at most, LLM's max_model_len. add_bos_token: begin texts with
    the BOS token, or don't; None does as the tokenizer. enable_thinking: passed to the chat
    template, if not None. think_end_token: an answer is what follows this text.
    Raises ValueError or TypeError, by name, for options that can't be.
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
        # The harness doesn't say when it is done.
        atexit.register(self.llm.close)
        self.tokenizer = self.llm.tokenizer.hf

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is."""
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
        """The text of a chat. ValueError if the model's template refuses it.

        A template that refuses system messages gets the others, as in the harness's own models.
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
        """Token ids of a text, which gets no second BOS token if it begins with one."""
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
        """Log-probabilities of whole texts, in windows as long as the context.

        A text follows the prefix token; the BOS that the tokenizer adds is not scored after it.
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
        """Of each continuation, and whether it is the greedy one; of what is too long, the end."""
        made = []
        for index, (_, context, continuation) in enumerate(requests):
            # The last token is only scored: it needs no place in the context.
            token_ids = (context + continuation)[-self.max_length - 1 :]
            first = max(len(token_ids) - len(continuation), 1)
            made.append(self.llm.score_request(index, token_ids, first))
        found = []
        for (texts, _, _), output in zip(requests, run_requests(self.llm, made), strict=True):
            is_greedy = all(it.rank == 1 for it in output.scores)
            result = math.fsum(it.logprob for it in output.scores), is_greedy
            found.append(result)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
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
    """A task's generation_kwargs, normalized, as SamplingParams; ValueError for what can't be."""
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
