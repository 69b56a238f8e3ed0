"""A CUDA run without a GPU: the device is asked for nothing that it refuses, stages or awaits."""

from __future__ import annotations

import pytest
import torch
from pretend_cuda import GPU, DeviceMix, DeviceTensor, decode_launches, pretend_cuda

from flexgen_ray import LLM, Policy, SamplingParams
from flexgen_ray.runtime.worker import Worker

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself is there")


@pytest.fixture
def device():
    with pretend_cuda() as pretend:
        yield pretend


def what(device) -> list[str]:
    """The words of all notes."""
    return sorted(note.what for note in device.notes.elements())


@pytest.mark.parametrize(
    "op",
    [
        lambda x, host: x + host,
        lambda x, host: host + x,
        lambda x, host: torch.mm(x, host),
        lambda x, host: x[host.long()],
        lambda x, host: torch.cat((x, host)),
        lambda x, host: x.index_copy_(0, torch.arange(4), x),
        lambda x, host: torch.mm(host, host, out=x),
        lambda x, host: torch.nn.functional.scaled_dot_product_attention(x, host, host),
    ],
)
def test_host_and_device_never_mix(device, op):
    x, host = torch.ones(4, 4, device=GPU), torch.ones(4, 4)
    with pytest.raises(DeviceMix, match="host tensor"):
        op(x, host)


def test_numbers_of_the_host_are_passed_by_value(device):
    x = torch.ones(3, device=GPU)
    assert (x * torch.tensor(2.0) + 1).tolist() == [3, 3, 3]
    with pytest.raises(DeviceMix):
        torch.stack((x.sum(), torch.tensor(1.0)))


def test_copies_across_the_link_are_seen_as_cuda_makes_them(device):
    x, pageable = torch.zeros(4, 4, device=GPU), torch.ones(4, 4)
    pinned = torch.ones(4, 4).copy_(torch.empty(4, 4, pin_memory=True).fill_(2))
    pinned = torch.empty(4, 4, pin_memory=True).copy_(pinned)
    for copy, notes in (
        (lambda: x.copy_(pinned, non_blocking=True), []),
        (lambda: pinned.copy_(x, non_blocking=True), []),
        (lambda: x[1:3].copy_(pinned[2:], non_blocking=True), []),
        (lambda: torch.tensor([1], pin_memory=True).to(GPU, non_blocking=True), []),
        (lambda: x.to("cpu", non_blocking=True), []),
        (lambda: x[:0].copy_(pageable[:0]), []),
        (lambda: x.copy_(pinned), ["blocking"]),
        (lambda: x.cpu(), ["blocking"]),
        (lambda: x.copy_(pageable, non_blocking=True), ["unpinned"]),
        (lambda: pageable.copy_(x, non_blocking=True), ["unpinned"]),
        (lambda: x[:, :2].copy_(pinned[:, :2], non_blocking=True), ["staged"]),
        (lambda: x.copy_(pinned.t(), non_blocking=True), ["staged"]),
        (lambda: x.copy_(pinned[0], non_blocking=True), ["staged"]),
        (lambda: x.half().copy_(pinned, non_blocking=True), ["staged"]),
        (lambda: x.copy_(pageable.t()), ["blocking", "staged"]),
    ):
        device.notes.clear()
        copy()
        assert what(device) == notes
    assert x.tolist() == torch.ones(4, 4).tolist()


def test_memory_is_pinned_as_long_as_any_of_it_is_used(device):
    x, part = torch.zeros(3, device=GPU), torch.empty(4, pin_memory=True)[1:]
    x.copy_(part, non_blocking=True)
    assert what(device) == []
    del part
    assert not device.num_pinned


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).all()),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, torch.zeros(1, device=GPU)),
        lambda x: x.unique(),
        lambda x: torch.where(x > 0),
        lambda x: torch.cuda.synchronize(),
    ],
)
def test_a_wait_for_the_device_is_seen(device, wait):
    wait(torch.ones(3, device=GPU))
    assert "sync" in what(device)


def test_an_event_is_recorded_before_anything_waits_for_it(device):
    event, stream = torch.cuda.Event(), torch.cuda.Stream(GPU)
    for wait in (event.synchronize, lambda: stream.wait_event(event)):
        with pytest.raises(AssertionError, match="never recorded"):
            wait()
    event.record(stream)
    stream.wait_event(event)


def test_the_device_is_gone_afterwards():
    with pretend_cuda():
        assert torch.ones(2, device=GPU).is_cuda and torch.cuda.is_available()
    assert not torch.cuda.is_available()
    with torch.inference_mode():
        assert torch.ones(2).is_inference()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(2, device=GPU)
    with pytest.raises(RuntimeError):
        DeviceTensor(torch.ones(2))[0]


def test_launches_are_those_of_the_ops_of_a_decoding_batch(tmp_path):
    """Ragged rows take a mask, which attention takes as numbers to add."""
    (tmp_path / "equal").mkdir()
    (tmp_path / "ragged").mkdir()
    equal = decode_launches("opt", tmp_path / "equal", is_ragged=False)
    ragged = decode_launches("opt", tmp_path / "ragged", is_ragged=True)
    assert equal.other_layers.keys() == {"project", "attend_device", "finish"}
    # At least each layer's six products, with a bias each, and attention.
    assert 7 <= sum(equal.other_layers.values()) <= sum(ragged.other_layers.values())
    assert sum(equal.other_layers.values()) <= sum(equal.first_layer.values())


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_cudnn_never_attends_on_cuda_and_is_left_alone_on_a_cpu(text_model, name, tmp_path):
    """Neither where rates are measured, after a probe, nor in a process that loads without one."""
    is_used, attends = name == "cpu", torch.backends.cuda.cudnn_sdp_enabled
    with pretend_cuda():
        torch.backends.cuda.enable_cudnn_sdp(True)
        Worker().probe(name, str(tmp_path))
        assert attends() is is_used
        with LLM(text_model, policy=Policy(4), device=name, dtype="float32", use_ray=False) as llm:
            torch.backends.cuda.enable_cudnn_sdp(True)
            llm.generate([[5, 6]], SamplingParams(1))
            assert attends() is is_used
    assert attends()
