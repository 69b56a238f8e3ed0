"""The shapes of a block that a planner tries. Knows how large a job is; no costs, no placement."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product

from flexgen_ray.config import Policy
from flexgen_ray.planner.corners import SHARES, Share
from flexgen_ray.planner.pipeline_plan import PlannedJob

BATCH_SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16)
# A coarse grid of every so many is tried first.
COARSE = 2
TILES = (512, 2048)


@dataclass(frozen=True)
class SearchSpace:
    """What may be chosen. base: has what may not, such as the bits of weights and cache; layers:
    of each stage, if they are settled; max_seconds: that a block may take; shares, overlaps: as in
    lp.Aim; extra_blocks: in flight beyond the number of stages; cells: of a visit, as many are
    played (`Planner.simulate`)."""

    base: Policy = Policy()
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    batches: tuple[int, ...] = BATCHES
    tiles: tuple[int, ...] = TILES
    extra_blocks: tuple[int, ...] = (0, 1)
    layers: tuple[int, ...] | None = None
    max_seconds: float | None = None
    shares: tuple[Share, ...] = SHARES
    overlaps: bool = True
    cells: int | None = 384

    def near(self, shape: Policy) -> SearchSpace:
        """A quicker search, among blocks about as large as those of `shape`."""
        return replace(
            self,
            cells=128,
            batch_sizes=_near(shape.gpu_batch_size, self.batch_sizes, 1),
            batches=_near(shape.num_gpu_batches, self.batches, 1),
        )


@dataclass(frozen=True)
class Grid:
    """Of a job on so many stages."""

    search: SearchSpace
    job: PlannedJob
    num_stages: int

    def all(self) -> Iterator[Policy]:
        shapes = list(self._shapes(self.search.batch_sizes, self.search.batches))
        return chain(shapes, self.with_larger_tiles(shapes))

    def coarse(self) -> Iterator[Policy]:
        return self._shapes(self.search.batch_sizes[::COARSE], self.search.batches[::COARSE])

    def around(self, shape: Policy) -> Iterator[Policy]:
        """As far as the coarse grid's next ones."""
        return self._shapes(
            _near(shape.gpu_batch_size, self.search.batch_sizes),
            _near(shape.num_gpu_batches, self.search.batches),
        )

    def with_larger_tiles(self, shapes: Iterable[Policy]) -> Iterator[Policy]:
        """The same shapes, unless a batch's prompts fit the smallest tile."""
        for shape in shapes:
            if shape.gpu_batch_size * self.job.prompt_len > self.search.tiles[0]:
                yield from (replace(shape, max_batch_tokens=it) for it in self.search.tiles[1:])

    def smallest(self) -> Iterator[Policy]:
        """Blocks of a request or two."""
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


def _near(value: int, grid: tuple[int, ...], steps: int = COARSE) -> tuple[int, ...]:
    """It, or the next above, and as many on each side."""
    at = min(bisect_left(grid, value), len(grid) - 1)
    return grid[max(at - steps, 0) : at + steps + 1]
