"""Evaluations give what a plain computation with transformers gives."""

from __future__ import annotations

import json
import math
import re
import signal
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexgen_ray.cli.main import main
from flexgen_ray.evaluation.perplexity import windows
from flexgen_ray.integrations.lm_eval_command import main as harness

TEXT = "The quick brown fox jumps over the lazy dog; then, 12 days later, it sleeps. " * 5


@pytest.fixture
def run_eval(monkeypatch, capsys, text_model):
    """The result of the command, and what it said; or the exit status and the error."""

    def call(*arguments: object) -> dict | str:
        options = ["--model", text_model, "--no-use-ray", "--dtype", "float32", "--device", "cpu"]
        argv = ["flexgen-ray", "eval", *arguments, *options]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in argv])
        terminate = signal.getsignal(signal.SIGTERM)
        try:
            main()
        except SystemExit as ended:
            if ended.code:
                return capsys.readouterr().err
        finally:
            signal.signal(signal.SIGTERM, terminate)
        shown = capsys.readouterr()
        result = json.loads(shown.out.splitlines()[-1])
        answer = f"perplexity {result['perplexity']:.4f} over" if "nll" in result else "accuracy "
        assert any(line.startswith(answer) for line in shown.err.splitlines())
        return result

    return call


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@given(st.integers(2, 300), st.integers(2, 40), st.data())
def test_windows_score_every_token_but_the_first_once_within_the_context(count, context, data):
    stride = data.draw(st.integers(1, context - 1))
    found = list(windows(count, context, stride))
    scored = [token for it in found for token in range(it.first, it.stop)]
    assert scored == list(range(1, count))
    for it in found:
        assert it.start < it.first and it.stop - it.start <= context
        assert it.start == 0 or it.first - it.start >= context - stride


def plain_perplexity(folder, text: str, context: int, stride: int) -> tuple[float, int]:
    """As in transformers' guide, but with tokens counted exactly."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder).encode(text)])
    nll, count, previous = 0.0, 0, 0
    for start in range(0, ids.shape[1], stride):
        stop = min(start + context, ids.shape[1])
        window = ids[:, start:stop]
        labels = window.clone()
        labels[:, : -(stop - previous)] = -100
        scored = int((labels[:, 1:] != -100).sum())
        if scored:
            with torch.no_grad():
                nll += model(window, labels=labels).loss.item() * scored
        count, previous = count + scored, stop
        if stop == ids.shape[1]:
            break
    return math.exp(nll / count), count


@pytest.mark.parametrize("scored_in", ["prefill", "decode"])
@pytest.mark.parametrize("context, stride", [(32, 16), (100, 33), (24, 24)])
def test_perplexity_is_that_of_transformers(
    run_eval, text_model, text_file, tmp_path, scored_in, context, stride
):
    result = run_eval(
        "perplexity", "--data", text_file, "--context", context, "--stride", stride,
        "--scored-in", scored_in, "--json", tmp_path / "result.json",
    )  # fmt: skip
    wanted, count = plain_perplexity(text_model, TEXT, context, stride)
    assert result["tokens"] == count
    assert result["perplexity"] == pytest.approx(wanted, rel=1e-4)
    assert result["nll"] == pytest.approx(math.log(wanted), abs=1e-4)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["scored_in"] == scored_in and result["seconds"] > 0
    assert result["context"] == context and result["stages"][0]["policy"]


def test_max_tokens_measures_the_first_tokens_only(run_eval, text_model, text_file):
    result = run_eval("perplexity", "--data", text_file, "--context", 32, "--max-tokens", 50)
    assert "stride 512" in result
    options = ["--context", 32, "--stride", 16, "--max-tokens", 50]
    result = run_eval("perplexity", "--data", text_file, *options)
    wanted, _ = plain_perplexity(text_model, TEXT[:50], 32, 16)
    assert result["tokens"] == 49 and result["perplexity"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    "text, options, complaint",
    [
        (b"x", [], "the text has 1 tokens"),
        (b"", [], "the text has 0 tokens"),
        (b"xyz", ["--stride", 0], "Invalid value for '--stride'"),
        (b"xyz", ["--context", 1], "context is 1"),
        (b"xyz" * 100, ["--context", 162, "--stride", 99], "162 tokens .* context is 160"),
        (b"xyz", ["--json", "no/such/folder.json"], "no/such does not exist"),
        (b"\xff\xfe", [], "is in UTF-16, but must be in UTF-8"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_numbers(
    run_eval, tmp_path, text, options, complaint
):
    path = tmp_path / "text.txt"
    path.write_bytes(text)
    said = run_eval("perplexity", "--data", path, *options)
    assert re.search(complaint, said), said


@pytest.mark.parametrize("scored_in", ["prefill", "decode"])
def test_a_last_word_counts_if_all_its_tokens_are_the_greedy_ones(
    run_eval, text_model, tmp_path, scored_in
):
    """Words of one letter after a space, two tokens here: both must be what the model would say."""
    model = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32).eval()
    space = AutoTokenizer.from_pretrained(text_model).encode(" ")[0]
    contexts = torch.randint(35, 97, (3000, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        says_space = model(contexts).logits[:, -1].argmax(-1) == space
        spaced = torch.cat([contexts, torch.full((3000, 1), space)], dim=1)
        letters = model(spaced).logits[:, -1].argmax(-1)
    texts, right = [], 0
    for ids, is_right, letter in zip(
        spaced[::20].tolist() + spaced[says_space].tolist(),
        says_space[::20].tolist() + [True] * int(says_space.sum()),
        letters[::20].tolist() + letters[says_space].tolist(),
        strict=True,
    ):
        for last in (letter, 40 if letter != 40 else 41):
            if last > space:  # else it is no word
                texts.append("".join(chr(token + 30) for token in [*ids, last]))
                right += is_right and last == letter
    assert 2 < right < len(texts) // 2
    path = tmp_path / "cloze.jsonl"
    path.write_text("\n\n".join(json.dumps({"text": text + " \n", "id": 3}) for text in texts))
    result = run_eval("cloze", "--data", path, "--scored-in", scored_in)
    assert result["texts"] == len(texts) and result["tokens"] == 2 * len(texts)
    assert result["accuracy"] == pytest.approx(right / len(texts))


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", 'line 2: no {"text": ...}'),
        ('{"text": 5}', 'line 2: no {"text": ...}'),
        ('{"text": "one"}', "line 2: the text is 'one'; a last word needs another"),
    ],
)
def test_a_cloze_line_without_a_text_is_named(run_eval, tmp_path, line, complaint):
    path = tmp_path / "cloze.jsonl"
    path.write_text('{"text": "two words"}\n' + line)
    assert complaint in run_eval("cloze", "--data", path)


def test_without_the_harness_its_command_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(SystemExit, match=r"pip install 'flexgen-ray\[lm-eval\]'"):
        harness()
