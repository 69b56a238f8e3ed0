"""The cost model counts what really moves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from test_exactness import policies

from flexgen_ray import LLM, HardwareSpec, SamplingParams
from flexgen_ray.store.disk import Region

UNIT = HardwareSpec(*[1.0] * 8)  # so that seconds are bytes


@pytest.mark.parametrize("name", ["opt", "llama"])
@settings(max_examples=15)
@given(policy=policies)
def test_modelled_disk_bytes_are_those_that_were_asked_for(tiny_models, name, policy, monkeypatch):
    """Serially, so that nothing is fetched for a visit that never comes but the first weights."""
    folder, references = tiny_models[name]
    moved = {"read": 0, "written": 0}
    read, write = Region.read_into, Region.write

    def reading(self, buffer, offset=0):
        moved["read"] += buffer.nbytes
        return read(self, buffer, offset)

    def writing(self, buffer, offset=0):
        moved["written"] += buffer.nbytes
        return write(self, buffer, offset)

    prompts = [reference.prompt for reference in references]
    params = SamplingParams(max_tokens=5, temperature=0.0)
    with monkeypatch.context() as patch:
        options = {"policy": policy, "executor": "serial", "use_ray": False, "dtype": "float32"}
        with LLM(folder, hardware=UNIT, **options) as llm:
            requests = [llm.request(i, prompt, params) for i, prompt in enumerate(prompts)]
            llm.prepare(requests)
            patch.setattr(Region, "read_into", reading)
            patch.setattr(Region, "write", writing)
            list(llm.stream(requests))
            layout = llm._plans[0].weights
            modelled = llm.report.stages[0].measured.modelled_resources
            tables = [place.tier == "disk" for place in layout.places[0].values()]
    assert modelled.get("disk_write", 0) == pytest.approx(moved["written"])
    in_vain = sum(
        layout.streams[layer].nbytes("disk") for layer in (1, 2) if layer in layout.streams
    )
    if not any(tables):  # looked-up rows of an embedding on disk are no op of their own
        read_modelled = modelled.get("disk_read", 0)
        assert read_modelled <= moved["read"] + 1e-6
        assert moved["read"] <= read_modelled + in_vain + 1e-6
