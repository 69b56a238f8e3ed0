"""The block shapes that the planner tries.

The module knows how large a job is; no costs, no placement.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise, product

from flexgen_ray.config import Policy
from flexgen_ray.planner.corners import SHARES, Share
from flexgen_ray.planner.pipeline_plan import PlannedJob

BATCH_SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320)
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16)
TILES = (512, 2048)
STEPS = 4  # into which the way to the next batch size is divided at last
COARSE_STRIDE = 2  # the coarse grid has every second batch size and number of batches


@dataclass(frozen=True)
class SearchSpace:
    """The choices that the planner has.

    base: gives everything that is not chosen, such as the bits of weights and cache.
    batch_sizes, batches, tiles: values of gpu_batch_size, num_gpu_batches and max_batch_tokens.
    extra_blocks: blocks in flight beyond the number of stages.
    layers: decoder layers of each stage; None lets the planner choose.
    max_seconds: limit on a block's latency. shares, overlaps: as in lp.Objective.
    whole_layers: True if experts that stream take the room of two whole layers on the device, False
    if they may stream in groups; None to try both.
    max_cells: about how many cells of a visit are simulated (`Planner.simulate`).
    """

    base: Policy = Policy()
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    batches: tuple[int, ...] = BATCHES
    tiles: tuple[int, ...] = TILES
    extra_blocks: tuple[int, ...] = (0, 1)
    layers: tuple[int, ...] | None = None
    max_seconds: float | None = None
    shares: tuple[Share, ...] = SHARES
    overlaps: bool = True
    whole_layers: bool | None = None
    max_cells: int | None = 384

    def near(self, shape: Policy) -> SearchSpace:
        """A quicker search, among blocks about as large as those of `shape`."""
        return replace(
            self,
            whole_layers=shape.expert_slots is None,
            base=replace(self.base, expert_slots=shape.expert_slots),
            max_cells=128,
            batch_sizes=_neighbours(shape.gpu_batch_size, self.batch_sizes, 1),
            batches=_neighbours(shape.num_gpu_batches, self.batches, 1),
        )


@dataclass(frozen=True)
class Grid:
    """The shapes of a search space for a job on a number of stages, as policies.

    No block is larger than the job.
    """

    search: SearchSpace
    job: PlannedJob
    num_stages: int

    def all(self) -> Iterator[Policy]:
        """Every shape with every tile."""
        shapes = list(self._shapes(self.search.batch_sizes, self.search.batches))
        return chain(shapes, self.with_larger_tiles(shapes))

    def coarse(self) -> Iterator[Policy]:
        """A quarter of the shapes, with the smallest tile."""
        return self._shapes(
            self.search.batch_sizes[::COARSE_STRIDE], self.search.batches[::COARSE_STRIDE]
        )

    def around(self, shape: Policy) -> Iterator[Policy]:
        """Shapes between this one and its neighbours on the coarse grid."""
        return self._shapes(
            _neighbours(shape.gpu_batch_size, self.search.batch_sizes, COARSE_STRIDE),
            _neighbours(shape.num_gpu_batches, self.search.batches, COARSE_STRIDE),
        )

    def with_larger_tiles(self, shapes: Iterable[Policy]) -> Iterator[Policy]:
        """These shapes with all larger tiles, except where prompts of a batch fit the smallest."""
        for shape in shapes:
            if shape.gpu_batch_size * self.job.prompt_len > self.search.tiles[0]:
                yield from (replace(shape, max_batch_tokens=it) for it in self.search.tiles[1:])

    def between(self, shape: Policy) -> Iterator[Policy]:
        """Shapes with batches between this one's and its neighbours on the whole grid.

        Memory that is too small for the next size may take a good part of the rows up to it.
        """
        size, grid = shape.gpu_batch_size, self.search.batch_sizes
        smaller, larger = (
            [it for it in grid if it < size][-1:],
            [it for it in grid if it > size][:1],
        )
        ends = [*smaller, size, *larger]
        steps = range(1, STEPS)
        counts = {
            low + (high - low) * step // STEPS for low, high in pairwise(ends) for step in steps
        }
        most = -(-self.job.num_requests // (shape.num_gpu_batches * (shape.blocks_in_flight or 1)))
        for count in sorted(counts - set(ends)):
            if count <= most:
                yield replace(shape, gpu_batch_size=count)

    def smallest(self) -> Iterator[Policy]:
        """Blocks of one request and of two, in one batch."""
        return self._shapes((1, 2), (1,))

    def _shapes(self, sizes: Iterable[int], batches: Sequence[int]) -> Iterator[Policy]:
        """Shapes of blocks no larger than the job, with the smallest tile."""
        extras = self.search.extra_blocks if self.num_stages > 1 else (0,)
        sizes = list(sizes)
        for number, extra in product(batches, extras):
            blocks = self.num_stages + extra
            if number > 1 and number * blocks > self.job.num_requests:
                continue
            most = -(-self.job.num_requests // (number * blocks))
            for size in dict.fromkeys(min(size, most) for size in sizes):
                yield replace(
                    self.search.base,
                    gpu_batch_size=size,
                    num_gpu_batches=number,
                    max_batch_tokens=self.search.tiles[0],
                    blocks_in_flight=blocks,
                )


def _neighbours(value: int, grid: tuple[int, ...], steps: int) -> tuple[int, ...]:
    """The value, or the next one above it on the grid, with so many neighbours on each side."""
    index = min(bisect_left(grid, value), len(grid) - 1)
    return grid[max(index - steps, 0) : index + steps + 1]
