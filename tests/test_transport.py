"""A stage that loses its neighbour frees itself, whatever its group does meanwhile."""

from __future__ import annotations

import threading

import pytest
import torch

from flexgen_ray.distributed.transport import _Blocking
from flexgen_ray.runtime.link import LinkClosed


class Stuck:
    """A group whose neighbour has gone: as NCCL's, it waits until it is aborted."""

    def __init__(self) -> None:
        self.begun, self.aborted = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.begun.set()
        assert self.aborted.wait(60)

    def abort(self) -> None:
        self.aborted.set()


def test_closing_aborts_what_would_keep_the_device_for_ever():
    group = Stuck()
    blocking = _Blocking(group, aborts=True)
    closing = threading.Thread(target=lambda: (group.begun.wait(60), blocking.close()))
    closing.start()
    with pytest.raises(LinkClosed):
        blocking.call(lambda group: group, torch.zeros(1))
    closing.join()
    assert group.aborted.wait(60)
    blocking.close()
