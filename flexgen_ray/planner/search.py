"""Chooses a job's policy: the block's shape from a grid, the placement by linear programming.

For every shape the program (lp.py) says how fast it could be; the best few are rounded to what the
stores can hold, checked against every budget, and judged anew. Knows rates and sizes; runs nothing.

How much throughput a block's latency buys: the best plan for every latency.

Beside the zig-zag schedule stands the row-by-row one of earlier systems, which reloads all streamed
weights for every batch and keeps its cache on the GPU. Knows plans; draws nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import chain, islice

from flexgen_ray.config import Budget, HardwareSpec, Policy, Workload
from flexgen_ray.cost.bound import PHASES, WAYS, decoding, prefilling
from flexgen_ray.cost.steady import simulate_pipeline
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.planner.corners import GROUPS, ON_DEVICE, Corners, Share, policy_of, shares_of
from flexgen_ray.planner.grid import Grid, SearchSpace
from flexgen_ray.planner.lp import (
    Infeasible,
    Objective,
    Solution,
    StageProblem,
    add_batch_latency,
    add_shared_seconds,
    excess_bytes,
    explain_infeasible,
    round_layers,
    solve,
    tighten_budget,
)
from flexgen_ray.planner.pipeline_plan import SCHEDULE, PipelinePlan, PlannedJob, StageDevice
from flexgen_ray.schedule.zigzag import StageLayers

ROW_BY_ROW = (*(Share("weights", where) for where in GROUPS["weights"]), *ON_DEVICE[1:])


@dataclass(frozen=True)
class Point:
    """seconds: from a block's start to its last token; sequences: in flight together."""

    seconds: float
    tokens_per_s: float
    sequences: int


def find_frontiers(planner: Planner) -> dict[str, list[Point]]:
    """{schedule: its points, each the fastest within its latency, the quickest first}."""
    rows = replace(planner.search, batches=(1,), shares=ROW_BY_ROW, extra_blocks=(0,))
    return {
        "zig-zag": _best(_points(planner.all_candidates(), planner)),
        "row by row": _best(_points(replace(planner, search=rows).all_candidates(), planner)),
    }


def throughput_within(points: list[Point], seconds: float) -> float:
    """Tokens/s within a latency; 0 if nothing is as quick."""
    return max((point.tokens_per_s for point in points if point.seconds <= seconds), default=0.0)


def _points(sketches: Iterable[Candidate], planner: Planner) -> list[Point]:
    return [
        Point(
            sketch.block_seconds,
            planner.job.mean_tokens / sketch.seconds_per_sequence,
            sketch.shape.block_size * (sketch.shape.blocks_in_flight or 1),
        )
        for sketch in sketches
    ]


def _best(points: list[Point]) -> list[Point]:
    """Those that no quicker one is as fast as."""
    found: list[Point] = []
    for point in sorted(points, key=lambda it: (it.seconds, -it.tokens_per_s)):
        if not found or point.tokens_per_s > found[-1].tokens_per_s:
            found.append(point)
    return found


PLANNED = 10  # of the most promising sketches, those whose tensors and rows fit
FINALISTS = 4  # of those plans that are played, if they could be so much faster than the best
WORTH_PLAYING = 1.01
# Layers of all stages that are played at least, or their ends would weigh too much.
FEW_LAYERS = 12
CENTRES = 3  # of the best shapes, around which others are tried
FIRST = 4  # of the coarse grid's shapes, every so many make a first estimate
ROUNDS = 6  # of tightening budgets until whole tensors and rows fit them


@dataclass(frozen=True)
class Candidate:
    """A shape, and what its best placement would take, whole tensors and rows left aside: seconds a
    sequence, and from a block's start to its end."""

    seconds_per_sequence: float
    block_seconds: float
    shape: Policy


OnEstimate = Callable[[Candidate], None]


def find_best_plan(planner: Planner, on_estimate: OnEstimate = lambda sketch: None) -> PipelinePlan:
    """The best of the grid's most promising plans, played if their lanes overlap.

    on_estimate: called early with the best of a few shapes, about as fast as the plan will be.
    Raises Infeasible with what the smallest block lacks if nothing fits.
    """
    sketches = planner.promising_candidates(on_estimate)
    planned = filter(None, (planner.plan(sketch.shape) for sketch in sketches))
    plans = sorted(islice(planned, PLANNED), key=_rate)
    if not plans:
        raise planner.refusal()
    best = plans.pop()
    if not planner.search.overlaps:
        return best
    best, left = planner.simulate(best, planner.search.cells), FINALISTS - 1
    # None is played faster than it is planned.
    while plans and left and _rate(plans[-1]) > WORTH_PLAYING * _rate(best):
        best = max(best, planner.simulate(plans.pop(), planner.search.cells), key=_rate)
        left -= 1
    return best


def _rate(plan: PipelinePlan) -> float:
    return plan.tokens_per_s


@dataclass(frozen=True)
class Planner:
    """One job of one model on given devices, a stage each.

    stages_disk, hops_on_device: as in StagePlan; resumes: as in Workload. Raises Infeasible if
    there are more stages than layers.
    """

    config: ModelConfig
    devices: tuple[StageDevice, ...]
    job: PlannedJob
    dtype: str
    search: SearchSpace = SearchSpace()
    stages_disk: bool = True
    hops_on_device: bool = False
    resumes: bool = False
    _known: dict[tuple, Corners] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        if len(self.devices) > self.config.num_layers:
            raise Infeasible(
                f"{len(self.devices)} stages are more than the model's {self.config.num_layers} "
                "layers; use fewer"
            )

    def promising_candidates(
        self, on_estimate: OnEstimate = lambda sketch: None
    ) -> list[Candidate]:
        """The fastest first: of a coarse grid, around its best as long as that finds better, and of
        the best with every size of tile. on_estimate: called with the best of the first few."""
        grid = self._grid
        coarse = list(grid.coarse())
        found = self._sketched(coarse[::FIRST])
        if found:
            on_estimate(found[0])
        rest = (shape for i, shape in enumerate(coarse) if i % FIRST)
        found = _fastest(found, self._sketched(rest))
        tried = {sketch.shape for sketch in found}
        centres: set[Policy] = set()
        while more := {it.shape for it in found[:CENTRES]} - centres:
            centres |= more
            near = set(chain.from_iterable(map(grid.around, more))) - tried
            found = _fastest(found, self._sketched(near))
            tried |= near
        best = [sketch.shape for sketch in found[:CENTRES]]
        found = _fastest(found, self._sketched(grid.with_larger_tiles(best)))
        return found or self._sketched(grid.smallest())

    def all_candidates(self) -> list[Candidate]:
        """Of the whole grid; slower."""
        return self._sketched(self._grid.all())

    def plan(self, shape: Policy) -> PipelinePlan | None:
        """The shape's best placement in whole layers, tensors and rows; None if there is none."""
        budgets = self._budgets
        layers = self._settled_layers
        for _ in range(ROUNDS):
            solution = self._solve(shape, budgets, layers)
            if solution is None:
                return None
            if layers is None:
                layers = round_layers(solution.layers, self.config.num_layers)
                continue
            policies = map(policy_of, [shape] * len(layers), layers, solution.shares)
            plan = self.evaluate(layers, list(policies))
            over = excess_bytes(self.devices, plan.stages)
            if not any(over):
                return plan
            budgets = [
                tighten_budget(budget, more) for budget, more in zip(budgets, over, strict=True)
            ]
        return None

    def evaluate(self, layers: tuple[int, ...], policies: list[Policy]) -> PipelinePlan:
        """What the cost model says of given policies; whether they fit is not asked."""
        ranges = StageLayers.split(self.config.num_layers, layers)
        stages = [self._stage(*pair) for pair in zip(ranges, policies, strict=True)]
        seconds = []
        for number, (count, policy) in enumerate(zip(layers, policies, strict=True)):
            corners, shares = self._corners(number, policy), shares_of(policy, count)
            found: dict[str, dict[str, float]] = {phase: {} for phase in PHASES}
            for phase, name in corners.quantities:
                if phase in found and (name not in WAYS or self.search.overlaps):
                    found[phase][name] = corners.value((phase, name), count, shares, count)
            seconds.append(found)
        for phase in PHASES:
            own = [stage[phase] for stage in seconds]
            if self.search.overlaps:
                add_batch_latency(own, stages[0].num_blocks)
            add_shared_seconds(self.devices, own, self.search.overlaps)
        return PipelinePlan(self.job, stages, seconds, self._prefill_visits(stages[0]))

    def simulate(self, plan: PipelinePlan, cells: int | None = None) -> PipelinePlan:
        """The plan with the seconds that the schedule makes of it, where that is slower. cells: of
        a visit of all blocks, layers and batches; about as many are played, all if None, and the
        others taken to be slowed as much."""
        rates, cores = self.rates(plan.stages[0].policy), [it.core_shares for it in self.devices]
        seconds = [{phase: dict(stage[phase]) for phase in PHASES} for stage in plan.seconds]
        rows = {
            "prefill": prefilling(plan.stages[0])[0],
            "decode": decoding(plan.stages[0], self.job.middle_position),
        }
        for phase in PHASES:
            # Passes of prompts hardly wait, but in a ring.
            few = phase == "prefill" and len(plan.stages) == 1
            part = self._part(plan, cells // 4 if cells and few else cells)
            visit = simulate_pipeline(part.stages, rates, rows[phase], cores)
            if part is not plan:
                visit *= plan.bound_seconds(phase) / part.bound_seconds(phase)
            seconds[-1][phase][SCHEDULE] = visit
        return replace(plan, seconds=seconds)

    def _part(self, plan: PipelinePlan, cells: int | None) -> PipelinePlan:
        """With fewer layers, if all of them are more than so many cells."""
        batches = plan.stages[0].num_batches
        counts = [stage.num_decoder_layers for stage in plan.stages]
        if cells is None or sum(counts) * batches <= cells:
            return plan
        kept = max(cells / batches, FEW_LAYERS) / sum(counts)
        layers = tuple(min(it, max(1, round(it * kept))) for it in counts)
        config = replace(self.config, num_layers=sum(layers))
        short = replace(self, config=config, search=replace(self.search, layers=None))
        return short.evaluate(layers, [stage.policy for stage in plan.stages])

    def rates(self, shape: Policy) -> list[HardwareSpec]:
        """Of each stage's device, for products of the shape's sizes."""
        tokens = min(shape.max_batch_tokens, shape.gpu_batch_size * self.job.prompt_len)
        return [device.rates(shape.gpu_batch_size, tokens) for device in self.devices]

    def refusal(self) -> Infeasible:
        """What the smallest block lacks."""
        smallest = replace(
            self.search.base,
            gpu_batch_size=1,
            num_gpu_batches=1,
            max_batch_tokens=self.search.tiles[0],
            blocks_in_flight=len(self.devices),
        )
        if self._sketch(smallest) is None:
            problems = self._problems(smallest, self._budgets, self._settled_layers)
            return Infeasible(
                explain_infeasible(problems, self.config.num_layers, self._aim(smallest))
            )
        return Infeasible("no placement fits in whole tensors and rows; raise the budgets")

    @property
    def _budgets(self) -> list[Budget]:
        return [device.budget for device in self.devices]

    @property
    def _settled_layers(self) -> tuple[int, ...] | None:
        return (self.config.num_layers,) if len(self.devices) == 1 else self.search.layers

    @property
    def _grid(self) -> Grid:
        return Grid(self.search, self.job, len(self.devices))

    def _sketched(self, shapes: Iterable[Policy]) -> list[Candidate]:
        """The fastest first, of those for which there is a placement."""
        return _fastest(list(filter(None, map(self._sketch, shapes))))

    def _sketch(self, shape: Policy) -> Candidate | None:
        solution, aim = self._solve(shape, self._budgets, self._settled_layers), self._aim(shape)
        if solution is None:
            return None
        seconds = sum(aim.visits(it) * solution.seconds[it] for it in PHASES)
        return Candidate(seconds / shape.block_size, seconds * (shape.blocks_in_flight or 1), shape)

    def _solve(
        self, shape: Policy, budgets: list[Budget], layers: tuple[int, ...] | None
    ) -> Solution | None:
        """With hidden states on the device if that fits: their trips take little of any lane, but
        every layer would wait for them, which the program doesn't see."""
        problems, aim = self._problems(shape, budgets, layers), self._aim(shape)
        near = tuple(it for it in aim.shares if it.what != "activations" or it in ON_DEVICE)
        total = self.config.num_layers
        return solve(problems, total, replace(aim, shares=near)) or solve(problems, total, aim)

    def _aim(self, shape: Policy) -> Objective:
        whole_model = StageLayers.whole(self.config.num_layers)
        limit, blocks = self.search.max_seconds, shape.blocks_in_flight or 1
        return Objective(
            self._prefill_visits(self._stage(whole_model, shape)),
            max(self.job.mean_tokens - 1, 0),
            blocks,
            None if limit is None else limit / blocks,
            self.search.shares,
            self.search.overlaps,
        )

    def _prefill_visits(self, stage: StagePlan) -> float:
        """Of prompts of the mean length, where the longest would take `prefilling`'s."""
        return max(prefilling(stage)[1] * self.job.mean_prompt_len / self.job.prompt_len, 1)

    def _problems(
        self, shape: Policy, budgets: list[Budget], layers: tuple[int, ...] | None
    ) -> list[StageProblem]:
        return [
            StageProblem(
                self._corners(number, shape),
                budgets[number],
                device.node,
                layers[number] if layers else None,
                dict(device.core_shares),
            )
            for number, device in enumerate(self.devices)
        ]

    def _corners(self, number: int, shape: Policy) -> Corners:
        """Of the stage's kind: what its ends are is all of its layers that counts there."""
        count, last = self.config.num_layers, len(self.devices) - 1
        ends = 0 if number == 0 else 2, count + 1 if number == last else count - 1
        key = ends, shape, id(self.devices[number].rates)
        found = self._known.get(key)
        if found is None:
            stage, rates = self._stage(StageLayers(*ends, count), shape), self.rates(shape)[number]
            found = self._known[key] = Corners(stage, rates, self.job.middle_position)
        return found

    def _stage(self, stage: StageLayers, policy: Policy) -> StagePlan:
        job, size = self.job, policy.block_size
        workload = Workload(size, job.prompt_len, job.max_seq_len, self.resumes, job.drawn)
        return StagePlan(
            self.config,
            stage,
            policy,
            workload,
            self.dtype,
            self.stages_disk,
            policy.blocks_in_flight or 1,
            self.hops_on_device,
        )


def _fastest(*sketches: list[Candidate]) -> list[Candidate]:
    return sorted(chain(*sketches), key=lambda it: it.seconds_per_sequence)
