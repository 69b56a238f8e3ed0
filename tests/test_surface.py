"""The surface for Python's users: outputs in vLLM's names, names that editors and mypy resolve."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import flexgen_ray
from flexgen_ray import LLM, Policy, SamplingParams
from flexgen_ray.processor import request_output
from flexgen_ray.request import Finished

GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
ROOT = Path(flexgen_ray.__file__).parents[1]


@pytest.fixture(scope="module")
def llm(text_model):
    with LLM(text_model, policy=Policy(8), use_ray=False, dtype="float32", device="cpu") as llm:
        yield llm


def test_an_output_knows_its_request_and_is_finished(llm):
    outputs = llm.generate(["In the", "A new", [97]], GREEDY, errors="return")
    assert [output.request_id for output in outputs] == ["0", "1", "2"]
    assert all(output.finished for output in outputs)
    assert llm.get_tokenizer().decode(outputs[0].prompt_token_ids) == "In the"


def test_the_stop_reason_is_the_stop_string_or_token_that_ended_an_answer(llm):
    (free,) = llm.generate("In the", GREEDY)
    answer = free.outputs[0]
    assert (answer.finish_reason, answer.stop_reason) == ("length", None)
    third = answer.token_ids[2]
    (by_token,) = llm.generate("In the", SamplingParams(8, 0.0, stop_token_ids=[third]))
    first = answer.token_ids.index(third)
    assert by_token.outputs[0].stop_reason == third
    assert by_token.outputs[0].token_ids == answer.token_ids[: first + 1]
    (by_text,) = llm.generate("In the", SamplingParams(8, 0.0, stop=["never", answer.text[2:4]]))
    assert by_text.outputs[0].stop_reason == answer.text[2:4]
    assert by_text.outputs[0].finish_reason == by_token.outputs[0].finish_reason == "stop"


def test_an_end_token_is_no_stop_reason(llm):
    assert llm.config.eos_token_ids == ()
    request = llm.request(0, "In the", replace(GREEDY, stop_token_ids=[5]))
    for reason in (None, 5):
        finished = Finished(0, [40, 5], "stop", stop_reason=reason)
        assert request_output(request, finished, llm.tokenizer).outputs[0].stop_reason == reason


@pytest.mark.parametrize("samples", [1, 3])
def test_metrics_are_in_order_and_within_the_call(llm, samples):
    before = time.time()
    params = [SamplingParams(length, seed=1, n=samples) for length in (1, 8)]
    short, long = llm.generate(["In the", "A new"], params)
    for output in (short, long):
        times = output.metrics
        assert before <= times.arrival_time <= times.first_token_time <= times.finished_time
    assert long.metrics.finished_time <= time.time()
    assert short.metrics.first_token_time <= long.metrics.finished_time
    (failed,) = llm.generate([[97]], GREEDY, errors="return")
    assert failed.metrics is None


@pytest.mark.parametrize(
    "stop, ids",
    [
        ([".", "!"], [5, 6]),
        ((".", "!"), (5, 6)),
        ({".", "!"}, {5, 6}),
        (np.array([".", "!"]), np.array([5, 6])),
    ],
)
def test_stops_may_be_any_collection(stop, ids):
    params = SamplingParams(stop=stop, stop_token_ids=ids)
    assert set(params.stop) == {".", "!"} and set(params.stop_token_ids) == {5, 6}
    hash(params)
    assert all(type(it) in (int, str) for it in (*params.stop, *params.stop_token_ids))
    assert SamplingParams(stop=".").stop == (".",) and SamplingParams(stop=None).stop == ()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"stop": 5}, "stop is 5; it must be non-empty strings"),
        ({"stop": [""]}, "it must be non-empty strings"),
        ({"stop": b"."}, "it must be non-empty strings"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5; it must be a list of token ids"),
        ({"stop_token_ids": [5.0]}, "it must be a list of token ids"),
        ({"stop_token_ids": "5"}, "it must be a list of token ids"),
        ({"stop": [""] * 999}, "'',...; it must be non-empty strings"),
    ],
)
def test_what_is_no_stop_is_refused(options, said):
    with pytest.raises(ValueError) as refused:
        SamplingParams(**options)
    assert said in str(refused.value)


def test_every_name_is_shown_and_resolves_without_torch_until_it_is_used():
    assert set(flexgen_ray.__all__) <= set(dir(flexgen_ray))
    for name in flexgen_ray.__all__:
        found = getattr(flexgen_ray, name)
        assert getattr(import_module(found.__module__), name) is found
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        _ = flexgen_ray.Nonsense
    script = "import sys, flexgen_ray; dir(flexgen_ray); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


GOOD = """
import flexgen_ray
from flexgen_ray import LLM, Faults, Placement, Policy, RequestOutput, SamplingParams, StagePolicies

policy: Policy = Policy(gpu_batch_size=8, weights=Placement(gpu=0.5, cpu=0.5))
with LLM("model", policy=policy, gpu_memory="16GiB", weight_bits=4, faults=Faults()) as llm:
    params = SamplingParams(max_tokens=8, stop=["."], stop_token_ids=[2])
    outputs: list[RequestOutput] = llm.generate(["a", "b"], params)
    outputs += llm.generate([[1, 2], [3]], [params, params])
    outputs += llm.generate([{"prompt": "a"}, {"prompt": "b"}])
    outputs += llm.generate((text for text in ("a", "b")), iter([params, params]), errors="return")
    outputs += llm.chat([{"role": "user", "content": "Hi"}], params)
    outputs += llm.chat([[{"role": "user", "content": "Hi"}]], params, use_tqdm=True)
    reason: int | str | None = outputs[0].outputs[0].stop_reason
    seconds: float = outputs[0].metrics.finished_time if outputs[0].metrics else 0.0
    request_id: str = outputs[0].request_id
version: str = flexgen_ray.__version__
stages = StagePolicies((policy, policy), (3, 2))
"""
BAD = {
    'LLM("model", gpu_memry="16GiB")': 'Unexpected keyword argument "gpu_memry"',
    'LLM("model", dtype=16)': 'Argument "dtype" to "LLM" has incompatible type "int"',
    "Policy(weight_bit=4)": 'Unexpected keyword argument "weight_bit"',
    "SamplingParams(best_of=3)": 'Unexpected keyword argument "best_of"',
    "LLM('model').generate(5)": 'Argument 1 to "generate" of "LLM" has incompatible type "int"',
    "LLM('model').generate('a', errors='ignore')": 'Argument "errors" to "generate"',
    "number: int = LLM('model').generate('a')[0].outputs[0].text": "Incompatible types",
    "from flexgen_ray import Nonsense": 'has no attribute "Nonsense"',
}
# What lies below the names that users import is checked with the package itself.
SETTINGS = """
[mypy]
strict = true
follow_imports = silent
[mypy-torch.*,transformers.*,ray.*,numba.*,rich.*,typer.*,yaml.*,psutil.*,safetensors.*,pulp.*]
follow_imports = skip
ignore_missing_imports = true
[mypy-highspy.*,huggingface_hub.*,jinja2.*,numpy.*,tokenizers.*]
follow_imports = skip
ignore_missing_imports = true
"""


def test_mypy_knows_the_types_of_everything_that_users_import(tmp_path, monkeypatch):
    assert (ROOT / "flexgen_ray" / "py.typed").is_file()
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    (tmp_path / "good.py").write_text(GOOD)
    head = "from flexgen_ray import LLM, Policy, SamplingParams"
    (tmp_path / "bad.py").write_text("\n".join([head, *BAD]))
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    command = [sys.executable, "-m", "mypy", "--cache-dir", tmp_path / "cache"]
    done = subprocess.run(
        [*command, "--config-file", "mypy.ini", "good.py", "bad.py"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if "error:" in line]
    assert not [line for line in said if line.startswith("good.py")], said
    for number, (line, wanted) in enumerate(BAD.items(), start=2):
        found = [it for it in said if it.startswith(f"bad.py:{number}:")]
        assert len(found) == 1 and wanted in found[0], (line, found, done.stderr)
