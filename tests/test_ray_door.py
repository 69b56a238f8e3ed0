"""A cluster that a run starts can be reached from this machine only, and only with its token."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from flexgen_ray import LLM, SamplingParams
from flexgen_ray.distributed.cluster import connect
from flexgen_ray.distributed.own_cluster import LOOPBACK_ONLY, InsecureCluster, is_loopback

# Ray takes another address for 127.0.0.1, unless it is told that there is no other machine.
STRANGER = """
import ray, sys
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
print("inside")
"""
LISTENER = """
import socket, sys
listening = socket.create_server((sys.argv[1], 0))
print(listening.getsockname()[1], flush=True)
sys.stdin.read()
"""


def environment(**variables: str) -> dict[str, str]:
    others = {name: it for name, it in os.environ.items() if not name.startswith("RAY_")}
    return others | {LOOPBACK_ONLY: "0", "RAY_NUM_REDIS_GET_RETRIES": "1"} | variables


@pytest.mark.parametrize("num_stages", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_listens_on_the_loopback_interface_alone(tiny_models, local_ray, num_stages):
    folder, references = tiny_models["llama"]
    greedy = SamplingParams(max_tokens=2, temperature=0.0)
    with LLM(folder, pipeline_parallel_size=num_stages) as llm:
        llm.generate([references[0].prompt], greedy)
        sockets = local_ray.sockets()
    stages = [it for it in sockets if it[2].startswith("ray::StageWorker")]
    # Each stage serves Ray, and with a neighbour also gloo.
    assert len(stages) >= num_stages * (1 if num_stages == 1 else 2)
    assert {name for _, _, name in sockets} >= {"gcs_server", "raylet"}
    assert all(is_loopback(address) for address, _, _ in sockets), sockets


@pytest.mark.parametrize(
    "token",
    [
        {},
        pytest.param({"RAY_AUTH_MODE": "disabled"}, marks=pytest.mark.slow),
        pytest.param(
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ab" * 32}, marks=pytest.mark.slow
        ),
    ],
    ids=["nothing", "disabled", "another token"],
)
def test_a_stranger_without_the_token_is_refused(local_ray, tmp_path, token):
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, local_ray.address],
        env=environment(HOME=str(tmp_path), **token), capture_output=True, text=True, timeout=200,
        check=False,
    )  # fmt: skip
    assert done.returncode != 0 and "inside" not in done.stdout
    assert "Authentication" in done.stderr


def test_a_socket_that_others_reach_is_refused_by_its_address(local_ray):
    for address, is_open in (("127.0.0.1", False), ("0.0.0.0", True)):
        with subprocess.Popen(
            [sys.executable, "-c", LISTENER, address],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as listener:  # fmt: skip
            port = listener.stdout.readline().strip()
            if is_open:
                with pytest.raises(
                    InsecureCluster, match=rf"listens on 0\.0\.0\.0:{port} \(python"
                ):
                    local_ray.check_sockets()
            else:
                local_ray.check_sockets()
            listener.stdin.close()


@pytest.mark.parametrize(
    ("address", "is_own"),
    [
        ("127.0.0.1", True), ("127.8.0.9", True), ("::1", True), ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False), ("::", False), ("192.0.2.2", False), ("::ffff:192.0.2.2", False),
        ("fe80::1%eth0", False), ("::ffff:0.0.0.0", False),
    ],
)  # fmt: skip
def test_loopback_is_known_by_its_address(address, is_own):
    assert is_loopback(address) is is_own


def test_the_token_is_its_owners_alone(local_ray):
    folder = Path(local_ray._remove_token.peek()[2][0])
    (token,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text()) == 64


def test_ray_client_is_refused_at_once_with_the_remedy(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match="ray://head:10001 is Ray Client.*ray job submit"):
        connect("ray://head:10001")
