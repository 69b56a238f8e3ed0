"""What the stores move arrives bit for bit, wherever it lies, and failures name the place."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import CPU, MIB, placements, tiers

from flexgen_ray.config import Placement, Policy, Workload
from flexgen_ray.layout.placement import SECTOR, stored_tensors
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import stage_bytes
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.schedule.ops import Op, OpKind
from flexgen_ray.schedule.zigzag import StageLayers, zigzag
from flexgen_ray.store import disk
from flexgen_ray.store.activations import HiddenStore
from flexgen_ray.store.disk import DiskTier
from flexgen_ray.store.memory import BudgetError, MemoryTier
from flexgen_ray.store.weights import WeightStore

FOLDERS = st.sampled_from([tempfile.gettempdir(), "/dev/shm"])


def model(tied: bool, mlp: int) -> ModelConfig:
    return ModelConfig(
        "opt", 3, 48, 4, 4, 12, mlp, 301, 64, 32, "float32", tied, "relu", 1e-5,
        norm_bias=True, attention_bias=True, output_bias=True, mlp_bias=True, position_table=66,
    )  # fmt: skip


class RandomWeights:
    """Every tensor random and different; kept, to compare with."""

    num_readers = 3

    def __init__(self) -> None:
        self.tensors: dict[tuple[int, str], torch.Tensor] = {}

    def is_packed(self, layer: int, name: str) -> bool:
        return False

    def check(self, layer: int, tensors: dict[str, tuple[int, ...]], kept: object) -> None:
        for name, shape in tensors.items():
            self.tensors[layer, name] = torch.randn(shape)

    def read_into(self, layer: int, name: str, destination: torch.Tensor, first: int = 0) -> None:
        destination.copy_(self.tensors[layer, name])


@pytest.fixture(params=["direct", "buffered"])
def requests(request, monkeypatch):
    """With direct requests where the file system takes them, and without."""
    if request.param == "buffered":
        monkeypatch.setattr(disk, "enable_direct_io", lambda fd: False)


@given(
    placement=placements(),
    num_batches=st.integers(1, 6),
    config=st.builds(model, st.booleans(), st.sampled_from([32, 500])),
    ends=st.sampled_from([(0, 4), (0, 1), (2, 4), (1, 2)]),
    folder=FOLDERS,
)
@settings(max_examples=60)
def test_weights_reach_the_device_bit_for_bit(
    requests, placement, num_batches, config, ends, folder
):
    stage = StageLayers(*ends, config.num_layers)
    policy = Policy(num_gpu_batches=num_batches, weights=placement)
    plan = StagePlan(config, stage, policy, Workload(1, 1, 2), "float32")
    places, source = tiers(folder), RandomWeights()
    try:
        store = WeightStore(plan, source, places)
        for op in zigzag(stage, num_batches, range(2)):
            if op.kind is OpKind.READ_WEIGHTS:
                store.read_part(op)
            elif op.kind is OpKind.LOAD_WEIGHTS:
                store.load_part(op)
            elif op.kind is OpKind.FINISH and op.layer in stage.with_weights:
                assert_layer(store.tensors(op), source, op.layer, config)
        if stage.first == 0:
            assert_lookups(store, source, config)
    finally:
        places.disk.close()
    for tier, booked in places.used().items():
        assert booked.items() <= stage_bytes(plan)[tier].items()


def assert_layer(found, source: RandomWeights, layer: int, config: ModelConfig) -> None:
    assert set(found) == set(config.tensors(layer))
    for name, tensor in found.items():
        expected = source.tensors.get((layer, name))
        expected = source.tensors[0, name] if expected is None else expected
        assert torch.equal(tensor, expected), (layer, name)


def assert_lookups(store: WeightStore, source: RandomWeights, config: ModelConfig) -> None:
    ids = torch.tensor([7, 0, 65, 7, 31])
    for name in config.tensors(0):
        table = source.tensors[0, name]
        assert torch.equal(store.lookup(name, None), table)
        if name != "project_in.weight":
            assert torch.equal(store.lookup(name, ids), table[ids])


def test_host_memory_starts_at_a_page_and_outlives_its_tier():
    tier = MemoryTier("cpu", MIB, CPU)
    tensors = [tier.allocate("test", nbytes) for nbytes in (5, 0, SECTOR + 1)]
    tier.close()
    for tensor, nbytes in zip(tensors, (5, 0, SECTOR + 1), strict=True):
        assert tensor.nbytes == nbytes and tensor.data_ptr() % SECTOR == 0
        assert not tensor.any()
    with pytest.raises(BudgetError, match="--cpu-memory"):
        tier.allocate("test", MIB)


@given(num_batches=st.integers(1, 9), placement=placements())
@settings(max_examples=60)
def test_parts_of_a_stream_are_whole_pages_and_each_byte_moves_once(num_batches, placement):
    config = model(tied=True, mlp=500)
    stage = StageLayers.whole(3)
    policy = Policy(num_gpu_batches=num_batches, weights=placement)
    layout = StagePlan(config, stage, policy, Workload(1, 1, 2), "float32").weights
    for layer, stream in layout.streams.items():
        assert len(stream.extents) <= 2 + (layer == config.head_layer)
        for tier in ("cpu", "disk"):
            pieces = [
                piece
                for part in range(num_batches)
                for piece in stream.pieces(tier, part, num_batches)
            ]
            assert sum(piece.nbytes for piece in pieces) == stream.nbytes(tier)
            bounds = [stream.span(tier, part, num_batches) for part in range(num_batches)]
            assert all(low % SECTOR == high % SECTOR == 0 for low, high in bounds)
            largest = layout.largest(tier, num_batches)
            assert all(high - low <= largest for low, high in bounds)
            assert all(piece.start % SECTOR == piece.target % SECTOR == 0 for piece in pieces)
        own = stored_tensors(config, stage, layer)
        assert all(layout.places[layer][name].tier in ("gpu", "cpu", "disk") for name in own)


@given(placement=placements(), batch=st.integers(1, 5), folder=FOLDERS)
@settings(max_examples=30)
def test_hidden_states_come_back_as_they_left(requests, placement, batch, folder):
    config = model(tied=True, mlp=32)
    policy = Policy(batch, 2, weights=Placement(0, 1, 0), activations=placement)
    plan = StagePlan(config, StageLayers.whole(3), policy, Workload(9, 40, 50), "float32")
    places = tiers(folder)
    try:
        store, home = HiddenStore(plan, places), {}
        for number in (0, 1):
            op = Op(OpKind.FINISH, 0, 1, number, number, 0, hidden_slot=number)
            home[op] = torch.randn(plan.cell_tokens - number, config.hidden_size)
            work = store.of_cell(op)[: len(home[op])]
            work.copy_(home[op])
            for move in (store.keep_resident, store.store, store.write):
                move(op, len(work))
            if not plan.hidden_stays:
                work.zero_()
        for op, tokens in home.items():
            for move in (store.read, store.load, store.fetch_resident):
                move(op, len(tokens))
            assert torch.equal(store.of_cell(op)[: len(tokens)], tokens)
    finally:
        places.disk.close()


@given(folder=FOLDERS, data=st.data())
@settings(max_examples=30)
def test_reads_at_any_offset_see_what_was_written(requests, folder, data):
    """Through memory that is page-aligned or not, and larger than one request."""
    pages, step = 9, data.draw(st.sampled_from([0, 1, 64, 513]))
    tier = DiskTier(MIB, Path(folder))
    try:
        region = tier.allocate("test", (pages + 2) * SECTOR).part(SECTOR, pages * SECTOR)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(disk, "REQUEST_BYTES", 2 * SECTOR)
            written = torch.randint(256, (pages * SECTOR + step,), dtype=torch.uint8)[step:]
            region.write(written)
            first = data.draw(st.integers(0, pages * SECTOR))
            last = data.draw(st.integers(first, pages * SECTOR))
            found = torch.empty(last - first + step, dtype=torch.uint8)[step:]
            region.read_into(found, first)
        assert torch.equal(found, written[first:last])
    finally:
        tier.close()


def test_direct_requests_are_made_where_the_file_system_takes_them(tmp_path):
    tier = DiskTier(MIB, tmp_path)
    region = tier.allocate("test", 2 * SECTOR)
    with open("/proc/self/fdinfo/" + str(region.file.fileno())) as info:
        flags = int(info.read().split("flags:")[1].split()[0], 8)
    assert bool(flags & os.O_DIRECT) == region.is_direct
    tier.close()


def test_a_file_that_was_cut_short_is_an_error_that_names_the_folder(requests, tmp_path):
    tier = DiskTier(MIB, tmp_path)
    region = tier.allocate("test", 4 * SECTOR)
    os.ftruncate(region.file.fileno(), 2 * SECTOR)
    with pytest.raises(OSError, match="the file ends before.*--offload-dir") as error:
        region.read_into(torch.zeros(4 * SECTOR, dtype=torch.uint8))
    assert error.value.filename == str(tmp_path)
    assert str(2 * SECTOR) in str(error.value)
    tier.close()


def test_a_failing_source_ends_the_filling_with_its_error(tmp_path):
    class Broken(RandomWeights):
        def read_into(self, layer, name, destination, first=0):
            if layer == 2:
                raise OSError(5, "Input/output error", "/data/model")
            super().read_into(layer, name, destination, first)

    config = model(tied=True, mlp=32)
    policy = Policy(weights=Placement(0, 0, 1))
    plan = StagePlan(config, StageLayers.whole(3), policy, Workload(1, 1, 2), "float32")
    with pytest.raises(OSError, match="/data/model"):
        WeightStore(plan, Broken(), tiers(tmp_path))
