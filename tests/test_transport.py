"""What stages say to each other arrives, and one that loses its neighbour frees itself."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flexgen_ray.distributed.transport import GlooLink, Meeting, MeetingPlace, _Blocking
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


def test_hidden_states_wait_for_nothing_but_their_sender():
    """No receive is begun before they are ready, and messages overtake them."""
    place = MeetingPlace("127.0.0.1")
    meeting = Meeting(place.host, place.port, 1, 2)
    with ThreadPoolExecutor(3) as pool:
        first, last = pool.map(lambda rank: GlooLink(meeting, rank, place.host), range(2))
        out, hidden = torch.zeros(3, 4), torch.arange(12.0).view(3, 4)
        receiving = pool.submit(last.recv, out)
        first.post(b"rows")
        assert last.next() == b"rows"
        assert last._receiver._pending is None
        first.send(hidden)
        receiving.result(60)
        assert torch.equal(out, hidden)
        receiving = pool.submit(last.recv, out)
        first.close()
        with pytest.raises(LinkClosed):
            receiving.result(60)
        last.close()
