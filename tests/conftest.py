"""Tests keep to themselves: a cache, an offload folder and a Ray of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile

# Before what reads them is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny models only wait for each other on several threads.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import pytest  # noqa: E402

# Failures in what tests share are explained as well as those in tests.
pytest.register_assert_rewrite("bench_results", "engine_runs", "job_files", "schedule_laws")

import tiny  # noqa: E402
import yaml  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from job_files import POLICY  # noqa: E402

# A busy machine is slow, not wrong; and fixtures here are never changed by a test.
settings.register_profile(
    "patient",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("patient")


# Files that take longest come early, so that no other worker waits for one of them at the end.
LONGEST = (
    "visits",
    "compression",
    "prefix_runs",
    "planner",
    "exactness",
    "job_submit",
    "ray_nodes",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups of tests, each for one process (--dist loadgroup): files, and all tests that share the
    session's Ray, of which a second one would take as long to start. That group comes first, for it
    mostly waits."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}

    def place(item: pytest.Item) -> tuple[bool, int]:
        return not _uses_ray(item), places.get(item.path.stem, len(places))

    for item in items:
        group = "ray" if _uses_ray(item) else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=place)


def _uses_ray(item: pytest.Item) -> bool:
    return "local_ray" in getattr(item, "fixturenames", ())


@pytest.fixture(autouse=True, scope="session")
def private_folders():
    """Ray's sockets need a short path."""
    kept = os.environ.get("XDG_CACHE_HOME")
    folder = tempfile.mkdtemp(prefix="fgr-", dir="/tmp")
    os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
    os.environ["RAY_TMPDIR"] = f"{folder}/ray"
    os.environ.pop("RAY_ADDRESS", None)
    os.mkdir(f"{folder}/ray")
    yield kept
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def quick_choices():
    """Kernels are chosen with caches of 1 MiB: with more the same win, in ten times as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexgen_ray.kernels.host_kernel.MEASURED_BYTES", 2**20)
        yield


@pytest.fixture(scope="session")
def user_cache(private_folders) -> str:
    """The real cache of whoever runs the tests, for models that were downloaded once."""
    return private_folders or os.path.expanduser("~/.cache")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """{name: (folder, references)} of every tiny model, with ragged prompts of 1 to 40 tokens."""
    prompts = tiny.prompts(7, 40)
    models = {}
    for name in tiny.CONFIGS:
        folder = tiny.save(name, tmp_path_factory.mktemp(name))
        models[name] = (folder, tiny.references(folder, prompts, 12))
    return models


@pytest.fixture(scope="session")
def text_model(tmp_path_factory):
    """A tiny Llama with a tokenizer of one character a token."""
    folder = tiny.save("llama", tmp_path_factory.mktemp("text"))
    tiny.add_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def chat_model(text_model, tmp_path_factory):
    """The same with a chat template."""
    folder = shutil.copytree(text_model, tmp_path_factory.mktemp("chat") / "model")
    turn = "<{{ message.role }}>{{ message.content }}\n"
    template = f"{{% for message in messages %}}{turn}{{% endfor %}}<assistant>"
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture
def files(tmp_path, text_model):
    """A model, an input of good and bad lines, a policy, and where the output goes."""
    lines = [
        json.dumps(
            {
                "custom_id": "batch",
                "method": "POST",
                "url": "/v1/completions",
                "body": {"model": "m", "prompt": "Hello there", "max_tokens": 5, "temperature": 0},
            }
        ),
        '{"prompt": "And you?", "max_tokens": 4, "temperature": 0.8, "seed": 3}',
        "no json",
        json.dumps({"custom_id": "long", "prompt": "x" * 500}),
        json.dumps({"custom_id": "full", "prompt": "y" * 150, "max_tokens": 100}),
        json.dumps({"custom_id": "ids", "prompt": [5, 6, 7]}),
        json.dumps({"custom_id": "bad ids", "prompt": [5, 10_000]}),
        json.dumps({"custom_id": "empty", "prompt": ""}),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(POLICY))
    return tmp_path


@pytest.fixture(scope="session")
def local_ray(private_folders):
    """One small cluster for the whole session, started as a run without an address starts one."""
    from flexgen_ray.distributed.own_cluster import OwnCluster

    cluster = OwnCluster(num_cpus=1)
    yield cluster
    cluster.close()


@pytest.fixture
def policy_of_all():
    """A share of everything on each tier."""
    from flexgen_ray.config import Placement, Policy

    third = Placement(0.34, 0.33, 0.33)
    return Policy(3, 2, 16, weights=third, cache=third, activations=third, cpu_attention=0.5)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """The same in this process, where torch is loaded already: for the many ways to be refused."""

    from flexgen_ray.cli.main import main

    def call(*arguments: object) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["flexgen-ray", *map(str, arguments)])
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = [*zip(numbers, map(signal.getsignal, numbers), strict=True)]
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            for number, handler in before:
                signal.signal(number, handler)
        shown = capsys.readouterr()
        return subprocess.CompletedProcess([], ended.value.code or 0, shown.out, shown.err)

    return call
