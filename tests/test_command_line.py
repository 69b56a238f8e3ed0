"""Options of the command line: their names, the names that they had, and their help."""

from __future__ import annotations

from dataclasses import fields
from inspect import signature

import pytest
import typer
from job_files import commands

from flexgen_ray import LLM, Policy, SamplingParams
from flexgen_ray.cli.app import FORMER_NAMES
from flexgen_ray.cli.main import app
from flexgen_ray.cost.resources import Resource
from flexgen_ray.reporting.wording import resource_name
from flexgen_ray.schedule.ops import Lane

COMMANDS = {
    name: command
    for name, command in commands(typer.main.get_command(app), "flexgen-ray")
    if name.startswith("flexgen-ray")
}
# Options of `generate` that configure the job's files, and nothing that Python has.
OF_THE_JOB = {
    "input", "output", "overwrite", "retry_errors", "keep_order", "max_errors", "report",
}  # fmt: skip


def options(name: str) -> list:
    return [option for option in COMMANDS[name].params if option.name != "help"]


def parsed(name: str, *arguments: object) -> dict:
    command = COMMANDS[name]
    required = {
        "flexgen-ray generate": ["--model", "m", "--input", "in", "--output", "out"],
        "flexgen-ray plan": ["--model", "m"],
    }
    words = [*required.get(name, []), *map(str, arguments)]
    return command.make_context(name, words).params


def test_an_option_that_configures_a_run_has_the_name_of_its_python_argument():
    arguments = set(signature(LLM.__init__).parameters)
    arguments |= {field.name for kind in (Policy, SamplingParams) for field in fields(kind)}
    names = {option.name for option in options("flexgen-ray generate")}
    assert OF_THE_JOB <= names and names - OF_THE_JOB <= arguments
    assert {"pipeline_parallel_size", "attention_sparsity", "use_ray", "stall_timeout"} <= names
    for option in options("flexgen-ray generate"):
        assert option.opts == [f"--{option.name.replace('_', '-')}"]


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        ("generate", ["--stages", "2"], {"pipeline_parallel_size": 2}),
        ("generate", ["--stages=auto"], {"pipeline_parallel_size": "auto"}),
        ("generate", ["--sparsity", 0.25], {"attention_sparsity": 0.25}),
        ("generate", ["--no-ray"], {"use_ray": False}),
        ("generate", ["--dummy-weights"], {"load_format": "dummy"}),
        ("generate", ["--hardware", "t4"], {"plan_for": "t4"}),
        ("demo", ["--stages", 3, "--no-ray"], {"pipeline_parallel_size": 3, "use_ray": False}),
        ("calibrate", ["--no-ray"], {"use_ray": False}),
        ("plan", ["--stages", 4, "--sparsity", 0.5],
         {"pipeline_parallel_size": 4, "attention_sparsity": 0.5}),
        ("plan", ["--hardware", "t4"], {"hardware": ["t4"]}),
        ("generate", ["--stop", "--no-ray"], {"stop": ["--no-ray"], "use_ray": True}),
    ],
)  # fmt: skip
def test_former_names_still_work_and_values_are_no_names(command, old, new):
    values = parsed(f"flexgen-ray {command}", *old)
    assert {name: values[name] for name in new} == new


def test_each_lane_and_resource_has_a_name_for_people():
    lanes = {lane.worker.value for lane in Lane}
    # Launches count as seconds of issuing.
    resources = {resource.name.lower() for resource in Resource} - {"launches"}
    for name in lanes | resources | {"cores", "the node's host_memory"}:
        assert resource_name(name) != name and "_" not in resource_name(name)
        assert "GPU" not in resource_name(name, on_gpu=False)
    assert resource_name("device") == "GPU compute"
    assert resource_name("load_weights") == "weights to GPU"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_s_help_stands_alone_and_says_the_default_once(name):
    """Former names are not shown."""
    context = typer.Context(COMMANDS[name])
    names = {spelling for option in options(name) for spelling in option.opts}
    for option in options(name):
        shown, text = option.get_help_record(context)
        words = " ".join(text.split())
        assert words[0].isupper(), shown
        defaults = words.count("[default: ") + words.count("; default: ")
        is_switch = option.is_flag and not option.secondary_opts
        assert defaults + words.count("required") == (0 if is_switch else 1), (shown, words)
        replaced = {old for old, new in FORMER_NAMES.items() if new.partition("=")[0] in names}
        assert not set(shown.split()) & replaced, shown
