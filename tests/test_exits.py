"""A signal ends a command with its own exit status, wherever it comes."""

from __future__ import annotations

import ast
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

import flexgen_ray
from flexgen_ray.batch.journal import Journal
from flexgen_ray.batch.response_lines import error_row
from flexgen_ray.cli.exits import end_with_status, explain_resuming, parse_max_errors, run
from flexgen_ray.reporting.terminal import printable
from flexgen_ray.signals import EXIT_STOPPED, STOPS, Stopped, raise_on_stop

STOPPED = "flexgen-ray: stopped\n"
SCRIPT = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup
from flexgen_ray.cli import main as cli

@cli.app.command()
def wait():
    exec("signal.raise_signal(signal.{name})")  # as dataclasses are made, and kernels compiled

cli.main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_stop_in_code_that_runs_from_a_string_ends_with_the_commands_status(tmp_path, name):
    (tmp_path / "stopped.py").write_text(SCRIPT.format(name=name))
    command = [sys.executable, "-m", "stopped", "wait"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (EXIT_STOPPED, STOPPED)


def test_a_stop_while_the_command_is_imported_does_too(tmp_path):
    """As soon as Python has begun to run it, whatever there is to import yet."""
    (tmp_path / "typer.py").write_text("exec('import signal; signal.raise_signal(signal.SIGINT)')")
    (tmp_path / "stopped.py").write_text("from flexgen_ray.__main__ import main; main()")
    command = [sys.executable, "-m", "stopped", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_STOPPED, "", STOPPED)


def test_what_ray_leaves_behind_changes_no_status(tmp_path):
    """Its threads may crash in the last steps of the C library, as this does each time."""
    (tmp_path / "stopped.py").write_text(
        "import atexit, ctypes, sys\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.on_exit(libc.abort, None)\n"
        "sys.modules['ray'] = sys\n"
        "atexit.register(print, 'cleaned up')\n"
        "from flexgen_ray.__main__ import main; main()\n"
    )
    command = [sys.executable, "-m", "stopped", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["cleaned up"]


@pytest.fixture
def answers_to_signals():
    """SIGHUP is not ignored, as nohup has it; what signals did before is put back."""
    before = {number: signal.getsignal(number) for number in STOPS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, answer in before.items():
        signal.signal(number, answer)


def test_nohup_lets_a_command_outlive_its_terminal(answers_to_signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise_on_stop()
    signal.raise_signal(signal.SIGHUP)
    with pytest.raises(Stopped):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_closed_terminal_sends_two_hangups_of_which_the_second_does_nothing(answers_to_signals):
    raise_on_stop()
    with pytest.raises(Stopped):
        signal.raise_signal(signal.SIGHUP)
    signal.raise_signal(signal.SIGHUP)


def test_a_stop_while_ray_starts_is_a_stop(answers_to_signals, monkeypatch):
    """Ray puts an answer of its own in place, which ends the process with another status."""
    import ray

    from flexgen_ray.distributed.own_cluster import initialize

    def init(**_: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        signal.raise_signal(signal.SIGTERM)

    raise_on_stop()
    ours = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(Stopped):
        initialize(address="local")
    assert signal.getsignal(signal.SIGTERM) is ours


@pytest.fixture
def ended(answers_to_signals, capsys, monkeypatch, tmp_path):
    """Runs a command that raises this; returns its status and what it says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["flexgen-ray"])

    def call(error: BaseException) -> tuple[int, str]:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

        @app.command()
        def fail() -> None:
            raise error

        with pytest.raises(SystemExit) as end:
            run(app)
        return end.value.code, capsys.readouterr().err

    return call


class PanicException(BaseException):
    """As Rust's panics come to Python."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("weight_map"), "KeyError: 'weight_map'"),
        (MemoryError(), "MemoryError: there is not enough memory"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (RuntimeError("CUDA error:\n  an illegal access"), "CUDA error: an illegal access"),
        (OSError("no space"), "no space"),
        (PanicException("index out of bounds"), "PanicException: index out of bounds"),
    ],
)
def test_any_exception_ends_in_one_line_that_names_its_traceback(ended, tmp_path, error, words):
    status, said = ended(error)
    (kept,) = (tmp_path / "flexgen_ray" / "errors").iterdir()
    assert (status, said) == (1, f"flexgen-ray: error: {words} (traceback: {kept})\n")
    assert "raise error" in kept.read_text() and type(error).__name__ in kept.read_text()


def test_what_a_user_can_mend_is_said_without_a_traceback(ended, tmp_path):
    for error in (_raised(parse_a_size), FileNotFoundError(2, "No such file", "in.jsonl")):
        status, said = ended(error)
        assert status == 1 and said.count("\n") == 1 and "traceback" not in said
    assert not [*tmp_path.iterdir()]
    noted = _raised(parse_a_size)
    noted.add_note("Traceback of stage 1")
    _, said = ended(noted)
    (kept,) = (tmp_path / "flexgen_ray" / "errors").iterdir()
    assert str(kept) in said and "Traceback of stage 1" in kept.read_text()
    assert "Traceback of" not in said


def parse_a_size() -> None:
    from flexgen_ray.units import parse_bytes

    parse_bytes("16 apples")


def _raised(function) -> Exception:
    with pytest.raises(ValueError) as caught:
        function()
    return caught.value


def test_a_traceback_finds_a_place_where_the_cache_has_none(ended, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert str(tmp_path) in ended(KeyError("x"))[1]


def test_what_goes_wrong_while_a_stop_is_obeyed_is_a_stop(ended):
    try:
        try:
            raise Stopped
        finally:
            raise OSError(5, "Input/output error")  # as writing to a terminal that has gone does
    except OSError as error:
        assert ended(error) == (EXIT_STOPPED, STOPPED)


@pytest.mark.parametrize("options", [["--nope"], ["generate", "--seed", "x"], ["generate"], ["no"]])
def test_wrong_usage_has_a_status_of_its_own(run_here, options):
    assert run_here(*options).returncode == 64


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.floats(0, 1))
def test_error_rows_up_to_max_errors_give_status_0(tmp_path, good, bad, most, share):
    path = tmp_path / "out.jsonl"
    ids = [f"line-{number}" for number in range(good + bad)]
    with Journal(path, overwrite=True) as journal:
        journal.check({}, ids)
        journal.begin()
        for custom_id in ids[:bad]:
            journal.append(error_row(custom_id, "bad"))
        for custom_id in ids[bad:]:
            journal.append({"custom_id": custom_id, "response": {"status_code": 200}})
        for limit, is_over in (
            (most, bad > most),
            (share, bad > share * len(ids)),
            (0, bad > 0),
        ):
            status = 0
            try:
                end_with_status(journal, limit)
            except typer.Exit as end:
                status = end.exit_code
            assert status == (2 if is_over else 0)
    assert parse_max_errors(str(most)) == most and isinstance(parse_max_errors(str(most)), int)
    assert parse_max_errors(repr(share)) == share
    assert isinstance(parse_max_errors(repr(share)), float)


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "nan", "5%"])
def test_max_errors_is_a_number_or_a_share(text):
    with pytest.raises(typer.BadParameter, match="neither a number of lines"):
        parse_max_errors(text)


@pytest.mark.parametrize(
    ("error", "begins", "answered", "is_told"),
    [
        (Stopped(), True, 1, True),
        (Stopped(), False, 1, True),  # an earlier run's answers
        (OSError("full"), True, 1, True),
        (KeyError("x"), True, 1, True),
        (OSError("no such policy"), False, 1, False),  # would end the next run too
        (Stopped(), True, 0, False),
        (Stopped(), True, 2, False),  # nothing is left to do
        (typer.Exit(2), True, 1, False),
    ],
)
def test_how_to_go_on_is_said_where_it_is_true(tmp_path, capsys, error, begins, answered, is_told):
    path = tmp_path / "out.jsonl"
    with Journal(path) as journal:
        journal.check({}, ["a", "b"])
        journal.begin()
        for custom_id in "ab"[:answered]:
            journal.append({"custom_id": custom_id, "response": {"status_code": 200}})
    with pytest.raises(type(error)), Journal(path) as journal, explain_resuming(journal):
        journal.check({}, ["a", "b"])
        if begins:
            journal.begin()
        raise error
    said = capsys.readouterr().err
    assert ("the same command" in said) == is_told and said.count("\n") == is_told


@given(st.text())
def test_no_text_steers_a_terminal(text):
    shown = printable(text)
    assert all(it in "\n\t" or unicodedata.category(it) not in ("Cc", "Cs") for it in shown)
    assert "\x1b" not in shown and "\u202e" not in shown
    shown.encode()
    assert printable(shown) == shown


def test_escapes_of_a_file_reach_no_terminal(tmp_path, run_here, text_model):
    (tmp_path / "in.jsonl").write_text(
        '{"custom_id": "a\\u001b[2J", "prompt": ""}\n{"prompt": "x"}\n'
    )
    done = run_here(
        "generate", "--model", text_model, "--input", tmp_path / "in.jsonl", "--output",
        tmp_path / "out.jsonl", "--no-use-ray", "--max-tokens", 1, "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 2 and "the first a\\x1b[2J: line 1" in done.stderr, done.stderr
    assert "\x1b[2J" not in done.stderr


def test_only_one_module_writes_to_the_terminal():
    """All texts pass its `printable`; scripts of shells are printed as they are."""
    root = Path(flexgen_ray.__file__).parent
    for path in root.rglob("*.py"):
        if path.name in ("terminal.py", "completion.py", "__main__.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("print", "typer.echo"), path


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 2, 4, 6, 8])
def test_sigterm_while_a_real_ray_starts_ends_with_130_and_a_word(tmp_path, text_model, seconds):
    (tmp_path / "in.jsonl").write_text('{"prompt": "Hello", "max_tokens": 90}\n' * 900)
    command = [
        sys.executable, "-m", "flexgen_ray", "generate", "--model", str(text_model), "--input",
        str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"),
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
        said = process.communicate(timeout=60)[1]
    assert process.returncode == EXIT_STOPPED, said
    assert said.endswith(STOPPED) and "Traceback" not in said
