"""Finds a job's policy: the block's shape on a grid, the placement by linear programming.

`find_best_plan` goes from many rough estimates to few exact ones:

1. Grid (grid.py): candidate shapes of a block, that is batch size, batches, tile, blocks in flight.
2. Linear program (lp.py): for each shape the best placement in fractions of layers, and its time.
   It is optimistic, because whole tensors are coarser and lanes wait for each other.
3. Rounding: the most promising shapes get whole layers, tensors and rows. If these exceed a budget,
   the program is solved again with a tighter budget.
4. Simulation (cost/steady.py): the best rounded plans run op by op in modelled time. The fastest of
   them wins.

The module knows rates and sizes; it runs nothing and draws nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from math import inf

from flexgen_ray.config import Budget, HardwareSpec, Policy, Workload
from flexgen_ray.cost.bound import LEAST, PATHS, PHASES, decoding_rows, prefilling_rows
from flexgen_ray.cost.steady import pipeline_visit_seconds
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.planner.corners import (
    ON_DEVICE,
    Corners,
    Share,
    pattern_of,
    policy_of,
    shares_of,
)
from flexgen_ray.planner.expert_slots import with_expert_slots
from flexgen_ray.planner.fill import may_hold_prefixes
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
from flexgen_ray.planner.visits import Visits, kinds_of
from flexgen_ray.schedule.zigzag import StageLayers

FIRST_ESTIMATE_STRIDE = 4  # every fourth shape of the coarse grid makes the first estimate
CENTRES = 3  # best shapes, around which the grid is refined
MAX_ROUNDINGS = 6  # rounds of tightening budgets until whole tensors and rows fit them
MAX_ROUNDED = 10  # most promising candidates that are rounded
MAX_SIMULATED = 4  # rounded plans that are simulated
MIN_GAIN = 1.01  # simulate a plan only if it might be this much faster than the best so far
# A larger size than the grid's best must be so much faster; for less, estimates don't tell.
# A smaller one needs less memory, so rounding to tensors and rows may make it the fastest.
MIN_BETWEEN = 1.03
# Fewest layers to simulate, of all stages together; with fewer, the model's ends weigh too much.
MIN_SIMULATED_LAYERS = 12
CACHE_ON_DEVICE = Share("cache", "gpu")
HIDDEN_ELSEWHERE = (Share("activations", "cpu"), Share("activations", "disk"))
LONG = 8  # times the mean length, from which the longest row is planned for apart
CACHE_ON_DISK = Share("cache", "disk")


@dataclass(frozen=True)
class Candidate:
    """A block's shape with the time of its best placement, before rounding to tensors and rows.

    seconds_per_sequence: seconds of all visits of a block, divided by its sequences.
    block_seconds: seconds from a block's start to its last token.
    """

    seconds_per_sequence: float
    block_seconds: float
    shape: Policy


OnEstimate = Callable[[Candidate], None]


def _ignore(candidate: Candidate) -> None:
    """Listen to no estimate."""


def find_best_plan(planner: Planner, on_estimate: OnEstimate = _ignore) -> PipelinePlan:
    """The fastest of the grid's most promising plans, simulated if lanes overlap.

    Prefixes that requests share lie on the device; in host memory if that is faster for blocks
    about as large, or if nothing fits else. With sparse attention they lie where rows do.
    on_estimate: called early with the best of a few shapes, about as fast as the plan will be.
    Raises Infeasible, which says what the smallest block lacks, if nothing fits.
    """
    best = _find_with_prefixes(planner, on_estimate)
    shape = best.stages[0].policy
    if planner.search.whole_layers is not None or shape.expert_slots is None:
        return best
    # Room for whole layers takes more memory, but half of a block's rows need not wait.
    search = planner.search.near(replace(shape, expert_slots=None))
    tier = best.stages[0].prefix_tier
    other = replace(planner, search=search, prefix_tier=tier)
    whole = other.best_of(other.promising_candidates())
    return max(filter(None, (best, whole)), key=_throughput)


def _find_with_prefixes(planner: Planner, on_estimate: OnEstimate) -> PipelinePlan:
    """The best plan, with prefixes that requests share on the tier that is faster for them."""
    if planner.job.sharing is None or planner.search.base.attention_sparsity < 1:
        return _find_best(planner, on_estimate)
    on_host = replace(planner, prefix_tier="cpu")
    try:
        best = _find_best(planner, on_estimate)
    except Infeasible:
        return _find_best(on_host, on_estimate)
    other = _find_with_prefixes_on_host(on_host, best, planner.estimate(best.stages[0].policy))
    return max(filter(None, (best, other)), key=_throughput)


def _find_with_prefixes_on_host(
    planner: Planner, best: PipelinePlan, ours: Candidate | None
) -> PipelinePlan | None:
    """The fastest plan among blocks about as large as the best one's, if one may be faster.

    ours: the best plan's shape with its estimate, before rounding.
    """
    shape = best.stages[0].policy
    near = replace(planner, search=planner.search.near(shape))
    sizes = {shape.gpu_batch_size, *near.search.batch_sizes}

    def may_be_faster(others: list[Candidate]) -> bool:
        fastest = min((other.seconds_per_sequence for other in others), default=inf)
        return ours is None or fastest < ours.seconds_per_sequence

    some = filter(None, (near.estimate(replace(shape, gpu_batch_size=size)) for size in sizes))
    if not may_be_faster(list(some)):
        return None
    others = near.promising_candidates()
    return near.best_of(others) if may_be_faster(others) else None


def _find_best(planner: Planner, on_estimate: OnEstimate) -> PipelinePlan:
    candidates = planner.promising_candidates(on_estimate)
    rounded = filter(None, (planner.plan(candidate.shape) for candidate in candidates))
    plans = sorted(islice(rounded, MAX_ROUNDED), key=_throughput)
    if not plans:
        raise planner.infeasible_error()
    best = plans.pop()
    if not planner.search.overlaps:
        return best
    max_cells = planner.search.max_cells
    best, left = planner.simulate(best, max_cells), MAX_SIMULATED - 1
    # A simulated plan is never faster than its bound, so slower bounds need no simulation.
    while plans and left and _throughput(plans[-1]) > MIN_GAIN * _throughput(best):
        best = max(best, planner.simulate(plans.pop(), max_cells), key=_throughput)
        left -= 1
    others = (
        [] if planner.keeps_all_on_device else list(map(planner.within, _simple_places(planner)))
    )
    return max(filter(None, (best, *map(_find_simple_plan, others))), key=_throughput)


def _simple_places(planner: Planner) -> Iterator[tuple[Share, ...]]:
    """Places to which plans are held that the program may overlook.

    The program counts a share of what an op costs for a share of the rows. But issuing an op takes
    as long with few rows, so a little of the cache in host memory may cost more than it gains. And
    it counts pages of average rows, but one tier must have pages for the longest row: if that is
    the device, budgets are tightened by all of them.
    """
    yield ON_DEVICE
    if planner.job.max_seq_len > LONG * planner.job.together_len:
        yield tuple(share for share in planner.search.shares if share != CACHE_ON_DEVICE)


def _find_simple_plan(planner: Planner) -> PipelinePlan | None:
    """The fastest plan within the planner's places, simulated; None if nothing fits."""
    if not any(map(planner.estimate, planner.smallest_shapes)):
        return None
    return planner.best_of(planner.promising_candidates())


def _throughput(plan: PipelinePlan) -> float:
    return plan.tokens_per_s


@dataclass(frozen=True)
class Planner:
    """Plans one job of one model on given devices, one stage each.

    stages_disk, hops_on_device, prefix_tier: as in StagePlan; resumes: as in Workload.
    Raises Infeasible if there are more stages than layers.
    """

    config: ModelConfig
    devices: tuple[StageDevice, ...]
    job: PlannedJob
    dtype: str
    search: SearchSpace = SearchSpace()
    stages_disk: bool = True
    hops_on_device: bool = False
    resumes: bool = False
    prefix_tier: str = "gpu"
    _corners_of_kind: dict[tuple, Corners] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        if len(self.devices) > self.config.num_layers:
            raise Infeasible(
                f"{len(self.devices)} stages are more than the model's {self.config.num_layers} "
                "layers; use fewer"
            )
        base, nbytes = self.search.base, min(device.budget.gpu for device in self.devices)
        if self.search.whole_layers:
            base = replace(base, expert_slots=None)
        else:
            base = with_expert_slots(base, self.config, self.dtype, nbytes)
        if base != self.search.base:
            object.__setattr__(self, "search", replace(self.search, base=base))
        if base.expert_slots:
            # Rows wait for experts on the device.
            on_device = (it for it in self.search.shares if it not in HIDDEN_ELSEWHERE)
            search = replace(self.search, shares=tuple(on_device))
            object.__setattr__(self, "search", search)

    def promising_candidates(self, on_estimate: OnEstimate = _ignore) -> list[Candidate]:
        """The fastest candidates first, from part of the grid.

        Estimates a coarse grid, then the neighbours of its best shapes as long as that finds better
        ones, then every tile size for the best, and at last batch sizes that the grid lacks.
        on_estimate: called with the best of the first few.
        """
        grid = self._grid
        coarse = list(grid.coarse())
        candidates = self._estimate_all(coarse[::FIRST_ESTIMATE_STRIDE])
        if candidates:
            on_estimate(candidates[0])
        rest = (shape for i, shape in enumerate(coarse) if i % FIRST_ESTIMATE_STRIDE)
        candidates = _fastest_first(candidates, self._estimate_all(rest))
        tried = {candidate.shape for candidate in candidates}
        centres: set[Policy] = set()
        while new := {candidate.shape for candidate in candidates[:CENTRES]} - centres:
            centres |= new
            neighbours = set(chain.from_iterable(map(grid.around, new))) - tried
            candidates = _fastest_first(candidates, self._estimate_all(neighbours))
            tried |= neighbours
        best = [candidate.shape for candidate in candidates[:CENTRES]]
        larger_tiles = self._estimate_all(grid.with_larger_tiles(best))
        candidates = _fastest_first(candidates, larger_tiles)
        best = [candidate.shape for candidate in candidates[:CENTRES]]
        between = [
            each
            for each in self._estimate_all(chain.from_iterable(map(grid.between, best)))
            if each.shape.gpu_batch_size < candidates[0].shape.gpu_batch_size
            or each.seconds_per_sequence * MIN_BETWEEN < candidates[0].seconds_per_sequence
        ]
        return _fastest_first(candidates, between) or self._estimate_all(grid.smallest())

    def all_candidates(self) -> list[Candidate]:
        """The fastest candidates first, from the whole grid; slower than the promising ones."""
        return self._estimate_all(self._grid.all())

    def estimate(self, shape: Policy) -> Candidate | None:
        """The shape with the time of its best placement in fractions; None if nothing fits."""
        solution = self._solve(shape, self._budgets, self._fixed_layers)
        if solution is None:
            return None
        objective = self._objective(shape)
        visits = objective.visits
        seconds = sum(count * solution.seconds[kind] for kind, count in visits.items())
        return Candidate(seconds / shape.block_size, seconds * (shape.blocks_in_flight or 1), shape)

    def plan(self, shape: Policy) -> PipelinePlan | None:
        """The shape's best placement in whole layers, tensors and rows; None if nothing fits.

        The first solution only fixes how many layers each stage has, if that isn't settled. Each
        later one is rounded to a policy; whole tensors may need more bytes than the fractions, so
        exceeded budgets are tightened by the excess, and the program is solved again.
        """
        budgets = self._budgets
        layers = self._fixed_layers
        for _ in range(MAX_ROUNDINGS):
            solution = self._solve(shape, budgets, layers)
            if solution is None:
                return None
            if layers is None:
                layers = round_layers(solution.layers, self.config.num_layers)
                continue
            policies = map(policy_of, [shape] * len(layers), layers, solution.shares)
            plan = self.evaluate(layers, list(policies))
            excess = excess_bytes(self.devices, plan.stages)
            if not any(excess):
                return plan if all(map(may_hold_prefixes, plan.stages)) else None
            budgets = list(map(tighten_budget, budgets, excess))
        return None

    def best_of(self, candidates: Iterable[Candidate]) -> PipelinePlan | None:
        """The first of these that fits in whole layers, tensors and rows, simulated; or None."""
        plan = next(filter(None, (self.plan(candidate.shape) for candidate in candidates)), None)
        if plan is None or not self.search.overlaps:
            return plan
        return self.simulate(plan, self.search.max_cells)

    def evaluate(self, layers: tuple[int, ...], policies: list[Policy]) -> PipelinePlan:
        """The cost model's seconds for given policies; budgets are not checked."""
        ranges = StageLayers.split(self.config.num_layers, layers)
        stages = list(map(self._stage_plan, ranges, policies))
        seconds = [
            self._stage_seconds(number, count, policy)
            for number, (count, policy) in enumerate(zip(layers, policies, strict=True))
        ]
        kinds = self._kinds(stages[0])
        for own in seconds:
            own |= {kind: _mixed(own, each.mix(stages[0])) for kind, each in kinds.items()}
            del own[LEAST]
        for phase in seconds[0]:
            of_stages = [stage[phase] for stage in seconds]
            if self.search.overlaps:
                add_batch_latency(of_stages, stages[0].num_blocks)
            add_shared_seconds(self.devices, of_stages, self.search.overlaps)
        counts = {kind: each.count for kind, each in kinds.items()}
        return PipelinePlan(self.job, stages, seconds, self._prefill_visits(stages[0]), counts)

    def _kinds(self, stage: StagePlan) -> dict[str, Visits]:
        return kinds_of(stage, self.job.lengths, self.job.num_requests)

    def _stage_seconds(
        self, number: int, layers: int, policy: Policy
    ) -> dict[str, dict[str, float]]:
        """{phase or LEAST: {lane, resource or way: seconds of a visit}} of one stage."""
        corners, shares = self._corners(number, policy), shares_of(policy, layers)
        seconds: dict[str, dict[str, float]] = {phase: {} for phase in (*PHASES, LEAST)}
        for phase, name in corners.quantities:
            if phase in seconds and (name not in PATHS or self.search.overlaps):
                seconds[phase][name] = corners.value((phase, name), layers, shares, layers)
        return seconds

    def simulate(self, plan: PipelinePlan, max_cells: int | None = None) -> PipelinePlan:
        """The plan with the seconds of its simulated schedule.

        max_cells: about how many cells (layers times batches, of one visit) to simulate; longer
        visits are shortened and their seconds scaled by the bounds of both. None simulates all.
        """
        rates = self.rates(plan.stages[0].policy)
        core_shares = [device.core_shares for device in self.devices]
        seconds = [{phase: dict(stage[phase]) for phase in stage} for stage in plan.seconds]
        rows = {
            "prefill": prefilling_rows(plan.stages[0])[0],
            "decode": decoding_rows(plan.stages[0], self.job.middle_position),
        }
        for phase in PHASES:
            # Passes of prompts hardly wait, except in a ring, so fewer cells tell enough.
            hardly_waits = phase == "prefill" and len(plan.stages) == 1
            cells = max_cells // 4 if max_cells and hardly_waits else max_cells
            short = self._shortened(plan, cells)
            visit = pipeline_visit_seconds(short.stages, rates, rows[phase], core_shares)
            if short is not plan:
                visit *= plan.bound_seconds(phase) / short.bound_seconds(phase)
            seconds[-1][phase][SCHEDULE] = visit
        last = seconds[-1]
        slower = {phase: last[phase][SCHEDULE] / plan.bound_seconds(phase) for phase in PHASES}
        for kind, each in self._kinds(plan.stages[0]).items():
            prompts = min(each.mix(plan.stages[0])["prefill"], 1.0)
            factor = prompts * slower["prefill"] + (1 - prompts) * slower["decode"]
            last[kind][SCHEDULE] = factor * plan.bound_seconds(kind)
        return replace(plan, seconds=seconds)

    def _shortened(self, plan: PipelinePlan, max_cells: int | None) -> PipelinePlan:
        """The plan for a model with fewer layers, if a visit has more than max_cells cells."""
        batches = plan.stages[0].num_batches
        counts = [stage.num_decoder_layers for stage in plan.stages]
        if max_cells is None or sum(counts) * batches <= max_cells:
            return plan
        fraction = max(max_cells / batches, MIN_SIMULATED_LAYERS) / sum(counts)
        # A stage alone keeps whole patterns of layers.
        whole = len(pattern_of(self.config)) if len(counts) == 1 else 1
        layers = tuple(
            min(count, max(1, round(count * fraction / whole)) * whole) for count in counts
        )
        config = replace(self.config, num_layers=sum(layers))
        short = replace(self, config=config, search=replace(self.search, layers=None))
        return short.evaluate(layers, [stage.policy for stage in plan.stages])

    def rates(self, shape: Policy) -> list[HardwareSpec]:
        """The rates of each stage's device, for matrix products of the shape's sizes."""
        tokens = min(shape.max_batch_tokens, shape.gpu_batch_size * self.job.prompt_len)
        rows = [shape.gpu_batch_size, tokens]
        if self.config.num_experts:
            plan = self._stage_plan(StageLayers.whole(self.config.num_layers), shape)
            rows += [plan.mixtures.batches * shape.gpu_batch_size, plan.expert_tokens]
        return [device.rates(*rows) for device in self.devices]

    def infeasible_error(self) -> Infeasible:
        """An error that says what the smallest block lacks."""
        smallest = replace(
            self.search.base,
            gpu_batch_size=1,
            num_gpu_batches=1,
            max_batch_tokens=self.search.tiles[0],
            blocks_in_flight=len(self.devices),
        )
        if self.estimate(smallest) is not None:
            return Infeasible("no placement fits in whole tensors and rows; raise the budgets")
        problems = self._stage_problems(smallest, self._budgets, self._fixed_layers)
        objective = self._objective(smallest)
        return Infeasible(explain_infeasible(problems, self.config.num_layers, objective))

    def within(self, shares: tuple[Share, ...]) -> Planner:
        """A planner that uses these places only."""
        return replace(self, search=replace(self.search, shares=shares))

    @property
    def keeps_all_on_device(self) -> bool:
        """True if the search allows no other place."""
        return set(self.search.shares) <= set(ON_DEVICE)

    @property
    def smallest_shapes(self) -> list[Policy]:
        """Blocks of one request and of two, in one batch."""
        return list(self._grid.smallest())

    @property
    def _budgets(self) -> list[Budget]:
        return [device.budget for device in self.devices]

    @property
    def _fixed_layers(self) -> tuple[int, ...] | None:
        """Layers of each stage; None if the program chooses them."""
        return (self.config.num_layers,) if len(self.devices) == 1 else self.search.layers

    @property
    def _grid(self) -> Grid:
        return Grid(self.search, self.job, len(self.devices))

    def _estimate_all(self, shapes: Iterable[Policy]) -> list[Candidate]:
        """The candidates of all shapes for which something fits, the fastest first."""
        return _fastest_first(list(filter(None, map(self.estimate, shapes))))

    def _solve(
        self, shape: Policy, budgets: list[Budget], layers: tuple[int, ...] | None
    ) -> Solution | None:
        """Solve with hidden states on the device, or in any place if that doesn't fit.

        Moving hidden states takes little time of any lane, but every layer waits for it, which the
        program doesn't see.
        """
        problems, objective = self._stage_problems(shape, budgets, layers), self._objective(shape)
        on_device = tuple(
            share
            for share in objective.shares
            if share.group != "activations" or share in ON_DEVICE
        )
        total = self.config.num_layers
        solution = solve(problems, total, replace(objective, shares=on_device))
        return solution or solve(problems, total, objective)

    def _objective(self, shape: Policy) -> Objective:
        whole_model = StageLayers.whole(self.config.num_layers)
        limit, blocks = self.search.max_seconds, shape.blocks_in_flight or 1
        shares = self.search.shares
        if shape.attention_sparsity < 1:
            shares = tuple(share for share in shares if share != CACHE_ON_DISK)
        visits, mixes = self._visits(self._stage_plan(whole_model, shape))
        return Objective(
            visits,
            mixes,
            blocks,
            None if limit is None else limit / blocks,
            shares,
            self.search.overlaps,
        )

    def _visits(self, stage: StagePlan) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """{kind: number} of the visits that a full block takes of the job's, and their mixes.

        With a limit on latency, a block is counted as beginning and ending together.
        """
        kinds = {} if self.search.max_seconds is not None else self._kinds(stage)
        if not kinds:
            decode = max(self.job.mean_tokens - 1, 0)
            visits = {"prefill": self._prefill_visits(stage), "decode": decode}
            return visits, {phase: {phase: 1.0} for phase in PHASES}
        share = stage.num_blocks * stage.policy.block_size / self.job.num_requests
        visits = {kind: share * each.count for kind, each in kinds.items()}
        return visits, {kind: each.mix(stage) for kind, each in kinds.items()}

    def _prefill_visits(self, stage: StagePlan) -> float:
        """Visits that a block's prompts take."""
        return prefilling_rows(stage)[1]

    def _stage_problems(
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
        """The corners of a stage's kind, computed once.

        A kind only says whether the stage has the model's first layers and its last, so all stages
        in the middle are of one kind.
        """
        count, last = self.config.num_layers, len(self.devices) - 1
        ends = 0 if number == 0 else 2, count + 1 if number == last else count - 1
        key = ends, shape, id(self.devices[number].rates)
        corners = self._corners_of_kind.get(key)
        if corners is None:
            stage = self._stage_plan(StageLayers(*ends, count), shape)
            corners = Corners(stage, self.rates(shape)[number], self.job.middle_position)
            self._corners_of_kind[key] = corners
        return corners

    def _stage_plan(self, stage: StageLayers, policy: Policy) -> StagePlan:
        job, size = self.job, policy.block_size
        mean = job.mean_seq_len(size * (policy.blocks_in_flight or 1))
        lengths = job.prompt_len, job.max_seq_len
        workload = Workload(
            size, *lengths, self.resumes, job.drawn, mean, job.mean_prompt_len, job.sharing
        )
        return StagePlan(
            self.config,
            stage,
            policy,
            workload,
            self.dtype,
            self.stages_disk,
            policy.blocks_in_flight or 1,
            self.hops_on_device,
            prefix_tier=self.prefix_tier,
        )


def _mixed(seconds: dict[str, dict[str, float]], mix: dict[str, float]) -> dict[str, float]:
    """{name: seconds} of a visit that is a sum of phases."""
    names = dict.fromkeys(name for phase in mix for name in seconds[phase])
    return {
        name: sum(share * seconds[phase].get(name, 0.0) for phase, share in mix.items())
        for name in names
    }


def _fastest_first(*candidates: list[Candidate]) -> list[Candidate]:
    return sorted(chain(*candidates), key=lambda it: it.seconds_per_sequence)
