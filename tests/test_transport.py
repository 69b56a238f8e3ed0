"""What stages say to each other arrives, and one that loses its neighbour frees itself."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flexgen_ray.distributed.transport import (
    MAX_MESSAGE_BYTES,
    GlooChannel,
    ProcessGroups,
    Rendezvous,
    RendezvousStore,
    TensorThread,
)
from flexgen_ray.runtime.ring import ChannelClosed


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
    blocking = TensorThread(group, aborts=True)
    closing = threading.Thread(target=lambda: (group.begun.wait(60), blocking.close()))
    closing.start()
    with pytest.raises(ChannelClosed):
        blocking.call(lambda group: group, torch.zeros(1))
    closing.join()
    assert group.aborted.wait(60)
    blocking.close()


def test_hidden_states_wait_for_nothing_but_their_sender():
    """No receive is begun before they are ready, and messages overtake them."""
    place = RendezvousStore("127.0.0.1")
    meeting = Rendezvous(place.host, place.port, 1, 2)
    with ThreadPoolExecutor(3) as pool:
        first, last = pool.map(lambda rank: GlooChannel(meeting, rank, place.host), range(2))
        out, hidden = torch.zeros(3, 4), torch.arange(12.0).view(3, 4)
        receiving = pool.submit(last.recv, out)
        first.post_message(b"rows")
        assert last.next_message() == b"rows"
        assert last.receiver.pending is None
        first.send(hidden)
        receiving.result(60)
        assert torch.equal(out, hidden)
        receiving = pool.submit(last.recv, out)
        first.close()
        with pytest.raises(ChannelClosed):
            receiving.result(60)
        last.close()


@pytest.mark.parametrize("announced", [-1, MAX_MESSAGE_BYTES + 1, 2**62])
def test_a_message_of_an_absurd_size_closes_the_link_and_takes_no_memory(announced):
    place = RendezvousStore("127.0.0.1")
    meeting = Rendezvous(place.host, place.port, 1, 2, secret=place.secret)

    def announce() -> object:
        """As stage 0, which makes the groups of edge 0, to stage 1, and then those of edge 1."""
        groups = ProcessGroups(meeting, place.host)
        small = groups.make("0/small", 0, is_hidden=False)
        others = groups.make("0/hidden", 0, is_hidden=True), groups.make("1/small", 1, False)
        small.send([torch.tensor([announced])], 1, 0).wait()
        return small, others

    with ThreadPoolExecutor(2) as pool:
        stranger, link = pool.submit(announce), pool.submit(GlooChannel, meeting, 1, place.host)
        with pytest.raises(ChannelClosed, match=f"announced a message of {announced:,} bytes"):
            link.result(60).next_message()
        assert stranger.result(60)


def test_a_message_too_large_to_send_is_refused_by_its_size(monkeypatch):
    monkeypatch.setattr("flexgen_ray.distributed.transport.MAX_MESSAGE_BYTES", 8)
    place = RendezvousStore("127.0.0.1")
    meeting = Rendezvous(place.host, place.port, 1, 2, secret=place.secret)
    with ThreadPoolExecutor(2) as pool:
        links = pool.map(lambda rank: GlooChannel(meeting, rank, place.host), range(2))
        first, last = links
        with pytest.raises(ValueError, match="a message of 9 bytes"):
            first.post_message(bytes(9))
        first.post_message(bytes(8))
        assert last.next_message() == bytes(8)
        first.close()


def test_nothing_joins_a_ring_without_its_secret(monkeypatch):
    """The store alone, which others may reach on a cluster, is not enough."""
    monkeypatch.setattr("flexgen_ray.distributed.transport.JOIN_SECONDS", 0.5)
    place = RendezvousStore("127.0.0.1")
    assert place.secret not in ("", RendezvousStore("127.0.0.1").secret)
    ring = Rendezvous(place.host, place.port, 1, 2, secret=place.secret)
    stranger = Rendezvous(place.host, place.port, 1, 2, secret="")
    with ThreadPoolExecutor(2) as pool:
        both = [
            pool.submit(ProcessGroups(meeting, place.host).make, "0/small", side, False)
            for side, meeting in enumerate((ring, stranger))
        ]
        for joining in both:
            with pytest.raises(RuntimeError):
                joining.result(60)
