"""Do more blocks in flight hide a slow network? Emulated stages whose hops take time; for ring.py.

Two stages hold everything on their devices. The network takes no time in one run, and in the other
as long as some layers of a batch. The schedule, the executor and the ring are measured.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks import gate
from benchmarks import paper_machines as t4
from benchmarks.lanes import FREE
from benchmarks.scaling import CELL_SECONDS, judge, run
from benchmarks.stand_in import StandIn
from flexgen_ray.config import RATE_NAMES, HardwareSpec, Policy, Workload
from flexgen_ray.cost.bound import decoding_rows, visit_seconds
from flexgen_ray.cost.ops import CostModel
from flexgen_ray.cost.resources import Resource
from flexgen_ray.cost.steady import pipeline_visit_seconds
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.rows import Composition
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.schedule.ops import Op, OpKind
from flexgen_ray.schedule.zigzag import StageLayers

SHAPE, STAGES, LAYERS_EACH = "opt-125m", 2, 6
HOP_LAYERS = 4  # layers of a batch that take as long as its hop


def hidden_hops() -> dict:
    """Decode throughput with the slow network over that with a free one, by blocks a stage.

    A comparison with a doubtful run (gate.py) is None.
    """
    settings: dict = {"emulated": True, "stages": STAGES, "layers_each": LAYERS_EACH}
    settings["hop_in_layers"] = HOP_LAYERS
    runs, shares = {}, {}
    for each in (1, 2):
        plans = _plans(each * STAGES)
        slow = _hardware(plans[0])
        free = replace(slow, network_bytes_per_s=FREE)
        of = {"slow": _run(plans, slow), "free": _run(plans, free)}
        runs[str(each)] = of
        shares[str(each)] = gate.ratio(of["slow"], of["free"], "decode_tokens_per_s")
    return settings | {"throughput_of_blocks_a_stage": shares, "runs": runs}


def _run(plans: list[StagePlan], hardware: HardwareSpec) -> dict:
    """Figures of a run, with what the cost model says of its decoding."""
    rows = decoding_rows(plans[0], t4.PROMPT_LEN)
    seconds = pipeline_visit_seconds(plans, [hardware] * STAGES, rows)
    busiest = max(max(visit_seconds(plan, hardware, rows).values()) for plan in plans)
    predicted = {
        "predicted_decode_tokens_per_s": round(plans[0].policy.block_size / seconds, 3),
        "predicted_busy_share": round(busiest / seconds, 4),
    }
    stand_in = StandIn(plans, [hardware] * STAGES, t4.PROMPT_LEN, CELL_SECONDS)
    return gate.attempt(lambda: run(stand_in) | predicted, judge)


def _plans(num_blocks: int) -> list[StagePlan]:
    config = replace(
        shape_config(SHAPE), vocab_size=96
    )  # else the head would take most of the time
    policy = Policy(8, 2, blocks_in_flight=num_blocks)
    workload = Workload(policy.block_size, t4.PROMPT_LEN, t4.PROMPT_LEN + t4.MAX_TOKENS)
    stages = StageLayers.split(config.num_layers, [LAYERS_EACH] * STAGES)
    return [
        StagePlan(config, each, policy, workload, "float16", num_blocks=num_blocks)
        for each in stages
    ]


def _hardware(plan: StagePlan) -> HardwareSpec:
    """Rates: a second for a batch in a layer, HOP_LAYERS for its hop, no time for the rest."""
    cost, rows = CostModel(plan), Composition(decoding_rows(plan, t4.PROMPT_LEN), plan.splits)

    def amount(kind: OpKind, resource: Resource) -> float:
        return cost.amounts(Op(kind, 0, 1, 0, 0, 0), rows)[resource]

    flops = sum(amount(kind, Resource.DECODE_FLOPS) for kind in (OpKind.PROJECT, OpKind.FINISH))
    free = HardwareSpec(**dict.fromkeys(RATE_NAMES, FREE), has_copy_engines=True)
    return replace(
        free,
        device_decode_flops_per_s=flops,
        network_bytes_per_s=amount(OpKind.SEND, Resource.NETWORK) / HOP_LAYERS,
    )
