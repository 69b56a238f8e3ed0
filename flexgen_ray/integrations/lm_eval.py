"""lm-evaluation-harness's model `flexgen_ray`: its tasks, answered by an offloaded model.

Importing this registers it. Knows what the harness asks for, and an LLM; all requests of a kind are
one job.
"""

from __future__ import annotations

import atexit
import math
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

from flexgen_ray.evaluation.run import answers
from flexgen_ray.llm import LLM
from flexgen_ray.messages import ChatOptions
from flexgen_ray.request import SamplingParams

MAX_NEW_TOKENS = 256  # where a task doesn't say
Pair = tuple[Any, list[int], list[int]]  # its texts, and the tokens of context and continuation


@register_model("flexgen_ray")
class FlexGenRay(TemplateLM):
    """pretrained: a model folder; options: the other arguments of LLM, such as policy, dtype and
    gpu_memory. batch_size and max_batch_size are the harness's; here the policy decides."""

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
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
        options = ChatOptions(None, add_generation_prompt, not add_generation_prompt)
        return self.llm.tokenizer.format_chat(chat_history, options)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """A text that begins with the beginning's own token gets no second one."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.bos_token)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, in windows as long as the context."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            token_ids = self.tok_encode(request.args[0])
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
        for (texts, _, _), output in zip(requests, answers(self.llm, made), strict=True):
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
            params = SamplingParams(
                max_tokens=max_tokens,
                temperature=wanted.get("temperature", 1.0 if wanted["do_sample"] else 0.0),
                top_p=wanted.get("top_p", 1.0),
                stop=tuple(stops[-1]),
            )
            made.append(self.llm.request(index, token_ids, params))
        texts = []
        for request, stop, output in zip(requests, stops, answers(self.llm, made), strict=True):
            texts.append(postprocess_generated_text(output.outputs[0].text, stop, None))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts
