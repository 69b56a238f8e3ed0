"""Lengths of a benchmark's requests: built-in mixtures, draws from them, and scaling."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
from documents import PACKAGE, ROOT
from hypothesis import given
from hypothesis import strategies as st

from flexgen_ray.cli.bench import lengths as module
from flexgen_ray.cli.bench.lengths import (
    MEAN_ANSWER,
    MIXTURES,
    MOST_ANSWER,
    conversations,
    draw,
    lengths_to_run,
    long_answers,
    scale,
)
from flexgen_ray.planner.comparison import read_job

LENGTHS = st.lists(st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)), min_size=1)


def totals(lengths):
    return [prompt_len + answer_len for prompt_len, answer_len in lengths]


def model(context: int) -> SimpleNamespace:
    """As much of an LLM as lengths of a built-in mixture need."""
    return SimpleNamespace(config=SimpleNamespace(max_seq_len=context))


@given(LENGTHS, st.integers(2, 50_000))
def test_scaling_drops_no_request_fills_the_length_and_keeps_the_others_shares(lengths, longest):
    scaled = scale(lengths, longest)
    factor = longest / max(totals(lengths))
    assert len(scaled) == len(lengths) and max(totals(scaled)) == longest
    for before, after in zip(lengths, scaled, strict=True):
        assert min(after) >= 1
        assert abs(sum(after) - max(2, factor * sum(before))) <= 0.5 + 1e-6
        assert abs(after[0] - factor * before[0]) <= 1.5 + 1e-6
    assert scale(scaled, longest) == scaled and scale(lengths, max(totals(lengths))) == lengths


@given(LENGTHS, st.data())
def test_a_draw_is_the_same_each_time_has_the_longest_and_is_part_of_a_larger_one(lengths, data):
    count = data.draw(st.integers(1, len(lengths)))
    drawn, all_but_none = draw(lengths, count), draw(lengths, len(lengths))
    assert len(drawn) == count and drawn == draw(lengths, count)
    assert max(totals(drawn)) == max(totals(lengths)) and all_but_none == lengths
    left = draw(lengths, min(count + 1, len(lengths)))
    for each in drawn:
        left.remove(each)  # fails for one that isn't there
    assert len(left) == (count < len(lengths))


def test_the_conversations_are_as_unequal_as_the_trace_and_can_be_planned_too():
    """The whole trace: mean prompt 1,154.7, mean answer 211.1, the longest of 14,089 tokens."""
    lengths = conversations()
    assert len(lengths) == 2000 and max(totals(lengths)) == 14_089
    prompts, answers = zip(*lengths, strict=True)
    assert fmean(prompts) == pytest.approx(1154.7, rel=0.01)
    assert fmean(answers) == pytest.approx(211.1, rel=0.01)
    assert max(totals(lengths)) / fmean(totals(lengths)) == pytest.approx(10.3, abs=0.1)
    job = read_job(Path(module.__file__).with_name("conversations_2000.csv"))
    assert (job.num_requests, job.mean_tokens) == (2000, fmean(answers))
    text = Path(module.__file__).with_name("conversations_2000.csv.license").read_text()
    assert "CC-BY-4.0" in text and "https://github.com/Azure/AzurePublicDataset" in text


def test_long_answers_are_as_said():
    lengths = long_answers()
    prompts, answers = zip(*lengths, strict=True)
    assert lengths == long_answers() and len(lengths) == 2000
    assert (min(prompts), max(prompts)) == (50, 400)
    assert fmean(prompts) == pytest.approx(225, rel=0.02)
    assert max(answers) == MOST_ANSWER and fmean(answers) == pytest.approx(MEAN_ANSWER, rel=0.01)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_is_scaled_to_the_model_s_context(name):
    lengths = MIXTURES[name].make()
    for context in (512, 2048, 131_072):
        run = lengths_to_run(Path(name), model(context), 1, None, None)
        fits = context < max(totals(lengths)) or name == "conversations"
        assert run == (scale(lengths, context) if fits else lengths)
    drawn = lengths_to_run(Path(name), model(2048), 1, 64, 300)
    assert len(drawn) == 64 and max(totals(drawn)) == 300


def test_a_count_or_a_length_that_cannot_be_had_is_named_with_its_limit_and_the_remedy():
    name = Path("long-answers")
    with pytest.raises(ValueError, match="--num-requests is 2001, but .* 2000 requests; lower it"):
        lengths_to_run(name, model(2048), 1, 2001, None)
    with pytest.raises(ValueError, match="--longest is 4096, but .* 2048 tokens; lower it"):
        lengths_to_run(name, model(2048), 1, None, 4096)
    with pytest.raises(ValueError, match="--longest is 1; .* 2 or more"):
        lengths_to_run(name, model(2048), 1, None, 1)


def test_a_file_named_like_a_mixture_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conversations").write_text('{"prompt_len": 3, "max_tokens": 4}\n')
    assert lengths_to_run(Path("conversations"), model(2048), 1, None, None) == [(3, 4)]


def test_everything_beside_the_modules_is_in_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["flexgen_ray"]
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".py"]
    for path in files:
        name = str(path.relative_to(PACKAGE))
        assert "__pycache__" in name or any(fnmatch(name, it) for it in patterns), name
