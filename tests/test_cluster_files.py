"""The files of cluster/ are valid, by Ray's own check and by KubeRay's API; typos in them are not.

Offline: nothing here reaches a cloud, a Kubernetes or a Ray cluster.
"""

from __future__ import annotations

import copy
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from click import ClickException, Command, Group
from jsonschema import Draft202012Validator, ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv
from ray.scripts.scripts import cli as ray_cli
from ray.scripts.scripts import start as ray_start

from flexgen_ray.cli.main import app

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
LAUNCHERS = ["aws.yaml", "on-premise.yaml"]
REFUSED = (ValidationError, ValueError, TypeError, NotImplementedError, ClickException)

# Ray's check looks at no name here: it reads these of the provider; EC2's RunInstances the others.
PROVIDER_KEYS = {
    "aws": {"type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips",
            "security_group"},
    "local": {"type", "head_ip", "worker_ips"},
}  # fmt: skip
EC2_KEYS = {
    "InstanceType", "ImageId", "BlockDeviceMappings", "IamInstanceProfile", "KeyName", "SubnetIds",
    "SecurityGroupIds", "InstanceMarketOptions", "Placement", "TagSpecifications",
}  # fmt: skip


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


def check(document: dict[str, Any]) -> None:
    if "apiVersion" in document or "kind" in document:
        check_rayjob(document)
    else:
        check_launcher(document)


def check_launcher(config: dict[str, Any]) -> None:
    """Ray's own two checks, and ours where Ray looks at no name."""
    if "type" not in config.get("provider", {}):
        raise ValueError("the provider has no type")
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    assert_known(config["provider"], PROVIDER_KEYS[config["provider"]["type"]])
    for node_type in prepared["available_node_types"].values():
        assert_known(node_type["node_config"], EC2_KEYS)
    for when in ("head_start_ray_commands", "worker_start_ray_commands"):
        words = shlex.split(" ".join(config[when]))
        used = {word.split("=")[0] for word in words if word.startswith("--")}
        assert_known(used, options(ray_start))


def check_rayjob(job: dict[str, Any]) -> None:
    """KubeRay's v1 API, what `ray start` takes, and that what is mounted is there."""
    kuberay_v1().validate(job)
    RuntimeEnv(**yaml.safe_load(job["spec"]["runtimeEnvYAML"]))
    for group in groups(job):
        assert_known({f"--{name}" for name in group["rayStartParams"]}, options(ray_start))
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        mounted = {mount["name"] for each in pod["containers"] for mount in each["volumeMounts"]}
        if mounted != volumes:
            raise ValueError(f"volumes are {sorted(volumes)}, mounted are {sorted(mounted)}")


@functools.cache
def kuberay_v1() -> Draft202012Validator:
    schema = yaml.safe_load((ROOT / "tests/kuberay_v1.schema.yaml").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def assert_known(names: Any, known: set[str]) -> None:
    if unknown := set(names) - known:
        raise ValueError(f"no such names: {sorted(unknown)}")


def options(command: Command) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}


def groups(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def paths(document: Any) -> Iterator[tuple[str | int, ...]]:
    """Every key of every mapping in it."""
    if isinstance(document, dict):
        yield from ((key,) for key in document)
    if isinstance(document, dict | list):
        entries = document.items() if isinstance(document, dict) else enumerate(document)
        yield from ((key, *rest) for key, inner in entries for rest in paths(inner))


def plant(document: Any, path: tuple[str | int, ...], mistake: str, value: Any = None) -> Any:
    """A copy with one mistake: what lies at `path` is "renamed", "removed" or "set"."""
    damaged = copy.deepcopy(document)
    *above, key = path
    inner = damaged
    for part in above:
        inner = inner[part]
    if mistake == "set":
        inner[key] = value
    else:
        old = inner.pop(key)
        if mistake == "renamed":
            inner[value] = old
    return damaged


@pytest.mark.parametrize("name", [*LAUNCHERS, "rayjob.yaml"])
def test_a_file_is_valid(name):
    check(load(name))


@pytest.mark.parametrize(
    ("name", "free"),
    [
        # Names of ours, and what EC2 makes of a disk.
        ("aws.yaml", {"worker", "~/flexgen_ray", "~/.ray/auth_token", "DeviceName", "Ebs",
                      "VolumeSize", "VolumeType", "Throughput"}),
        ("on-premise.yaml", {"~/flexgen_ray", "~/.ray/auth_token"}),
        ("rayjob.yaml", set()),
    ],
)  # fmt: skip
def test_a_misspelt_key_is_found_wherever_it_is(name, free):
    document = load(name)
    overlooked = set()
    for path in paths(document):
        try:
            check(plant(document, path, "renamed", f"{path[-1]}s"))
            overlooked.add(path[-1])
        except REFUSED:
            pass
    assert overlooked == free


@pytest.mark.parametrize(
    ("name", "path", "mistake", "value"),
    [
        ("aws.yaml", "max_workers", "set", "4"),
        ("aws.yaml", "max_workers", "set", 3),
        ("aws.yaml", "head_node_type", "set", "haed"),
        ("aws.yaml", "head_node_type", "removed", None),
        ("aws.yaml", "setup_commands 0", "set", 7),
        ("aws.yaml", "available_node_types worker min_workers", "set", "four"),
        ("aws.yaml", "available_node_types worker resources", "removed", None),
        ("aws.yaml", "available_node_types head node_config", "removed", None),
        ("on-premise.yaml", "cluster_name", "set", 1),
        ("on-premise.yaml", "provider head_ip", "removed", None),
        ("on-premise.yaml", "provider worker_ips", "set", "10.0.0.2"),
        ("on-premise.yaml", "provider type", "set", "on-premise"),
        ("on-premise.yaml", "worker_start_ray_commands", "set", "ray start"),
        ("on-premise.yaml", "worker_start_ray_commands 1", "set", "ray start --adress=$HEAD"),
        ("rayjob.yaml", "apiVersion", "set", "ray.io/v1alpha1"),
        ("rayjob.yaml", "metadata name", "removed", None),
        ("rayjob.yaml", "metadata name", "set", "Flexgen_Ray"),
        ("rayjob.yaml", "spec entrypoint", "set", ["python"]),
        ("rayjob.yaml", "spec runtimeEnvYAML", "set", {"env_vars": {}}),
        ("rayjob.yaml", "spec runtimeEnvYAML", "set", "env_vars: {HF_HUB_OFFLINE: 1}"),
        ("rayjob.yaml", "spec submissionMode", "set", "K8SJobMode"),
        ("rayjob.yaml", "spec shutdownAfterJobFinishes", "set", "true"),
        ("rayjob.yaml", "spec shutdownAfterJobFinishes", "removed", None),
        ("rayjob.yaml", "spec backoffLimit", "set", -1),
        ("rayjob.yaml", "spec activeDeadlineSeconds", "set", "1d"),
        ("rayjob.yaml", "spec rayClusterSpec", "removed", None),
        ("rayjob.yaml", "spec rayClusterSpec rayVersion", "set", 2.6),
        ("rayjob.yaml", "spec rayClusterSpec authOptions mode", "set", "tokens"),
        ("rayjob.yaml", "HEAD", "removed", None),
        ("rayjob.yaml", "HEAD rayStartParams num-cpus", "set", 0),
        ("rayjob.yaml", "WORKER groupName", "removed", None),
        ("rayjob.yaml", "WORKER replicas", "set", "4"),
        ("rayjob.yaml", "WORKER template", "removed", None),
        ("rayjob.yaml", "POD containers", "set", []),
        ("rayjob.yaml", "POD tolerations 0 operator", "set", "Exist"),
        ("rayjob.yaml", "POD volumes 0 persistentVolumeClaim claimName", "removed", None),
        ("rayjob.yaml", "POD volumes 1 emptyDir sizeLimit", "set", "200 GB"),
        ("rayjob.yaml", "POD volumes 1 name", "set", "ofload"),
        ("rayjob.yaml", "POD containers 0 image", "removed", None),
        ("rayjob.yaml", "POD containers 0 env 0 value", "set", 0.99),
        ("rayjob.yaml", "POD containers 0 resources limits memory", "set", "60GiB"),
        ("rayjob.yaml", "POD containers 0 volumeMounts 0 mountPath", "set", "models"),
    ],
)
def test_a_wrong_or_missing_value_is_found(name, path, mistake, value):
    path = path.replace("POD", "WORKER template spec")
    path = path.replace("WORKER", "spec rayClusterSpec workerGroupSpecs 0")
    path = path.replace("HEAD", "spec rayClusterSpec headGroupSpec")
    steps = tuple(int(part) if part.isdecimal() else part for part in path.split())
    with pytest.raises(REFUSED):
        check(plant(load(name), steps, mistake, value))


def test_one_ray_and_one_image_everywhere():
    """A worker of another version than the head's can't join it."""
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    dockerfile = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    job = load("rayjob.yaml")
    version = re.findall(r"^ray==(\S+)$", constraints, re.MULTILINE)
    assert version == re.findall(r"^FROM \S+:([0-9.]+)-", dockerfile, re.MULTILINE)
    assert version == [job["spec"]["rayClusterSpec"]["rayVersion"]]
    tag = re.findall(r"-t (\S+)", dockerfile)
    images = {
        each["image"] for group in groups(job) for each in group["template"]["spec"]["containers"]
    }
    assert tag == list(images)


def test_the_job_gives_options_that_the_command_has():
    words = shlex.split(load("rayjob.yaml")["spec"]["entrypoint"])
    assert words[:4] == ["python", "-m", "flexgen_ray", "generate"]
    command: Any = typer.main.get_command(app)
    known = options(command.commands["generate"])
    assert_known({word for word in words if word.startswith("--")}, known)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_node_of_a_launched_cluster_asks_for_the_token(name):
    config = load(name)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("export RAY_AUTH_MODE=token" in each for each in config["initialization_commands"])


def test_the_documentation_gives_commands_that_ray_has():
    text = (ROOT / "docs/clusters.md").read_text(encoding="utf-8").replace("\\\n", "")
    lines = [line for line in text.splitlines() if line.startswith("ray ")]
    assert len(lines) > 9
    for line in lines:
        words = shlex.split(line.partition("#")[0].partition(" -- ")[0])[1:]
        command: Any = ray_cli
        while isinstance(command, Group):
            command = command.commands[words.pop(0)]
        assert_known({word for word in words if word.startswith("-")}, options(command))
