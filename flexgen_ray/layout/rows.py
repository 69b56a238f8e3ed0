"""Rows of one pass of one batch: which slots bring how many new tokens, and how layers treat them.

Rows are ragged: a decoding row brings one token, a prefilling row a chunk of its prompt. Linear
layers process the packed tokens of all rows, attention the rows. `PlacedRows` divides the rows of a
pass by where their cache lies and who attends it; the stores move data, and the cost model counts
bytes, by the same answer.

Knows slots, tokens and homes; no tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Generic, TypeVar

import numpy as np

from flexgen_ray.config import PAGE_TOKENS
from flexgen_ray.layout.pages import FULL, Home, LayerKind, SharedHome, pages_of
from flexgen_ray.layout.placement import RowSplit

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """Part of a pass that belongs to one slot.

    position: tokens in the row's own cache before this pass; offset: index of its first new token
    among the packed tokens; is_sampled: True if a token is to be sampled after its last new one;
    is_prefill: True if its new tokens were known when the sequence took the slot, even if this pass
    brings only one of them. before: tokens of prefixes that it shares, which precede its own.
    """

    slot: int
    position: int
    num_new_tokens: int
    offset: int
    is_sampled: bool
    is_prefill: bool
    before: int = 0

    @property
    def tokens(self) -> slice:
        """Slice of the row's new tokens among the packed tokens."""
        return slice(self.offset, self.offset + self.num_new_tokens)

    @property
    def seq_len(self) -> int:
        """Tokens in the row's own cache after this pass."""
        return self.position + self.num_new_tokens


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring new tokens of one row; position: of the first; offset: among packed tokens."""

    row: Row
    position: int
    offset: int
    count: int

    @property
    def tokens(self) -> slice:
        """Slice of the piece among the packed tokens."""
        return slice(self.offset, self.offset + self.count)


def cut_at_pages(row: Row, kind: LayerKind = FULL) -> list[Piece]:
    """New tokens of a row: the rest of its last page, whole pages, and the beginning of a page.

    Tokens of pages that lie behind the window of the row's last token are left out.
    """
    end = row.seq_len
    start = max(row.position, PAGE_TOKENS * kind.first_page(end - 1))
    first = min(end, pages_of(start) * PAGE_TOKENS)
    last = max(first, end // PAGE_TOKENS * PAGE_TOKENS)
    bounds = (start, first), (first, last), (last, end)
    return [Piece(row, a, row.offset + a - row.position, b - a) for a, b in bounds if a < b]


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """Known tokens of a row whose log-probabilities are asked for, such as those of a prompt.

    first: index of the packed token that the first of them follows; top: number of likeliest tokens
    to report beside each.
    """

    slot: int
    first: int
    token_ids: tuple[int, ...]
    top: int


@dataclass(frozen=True)
class Rows:
    """All rows of a pass, and their packed tokens.

    token_ids: empty in stages after the first, which receive hidden states.
    moved: (slot, other batch, slot there) of rows that came from there. left: slots whose rows have
    left since the batch's last pass. grown: (slot, pages) of what rows got then. completed: (slot,
    prefix, its tokens) of rows that are prefixes, complete before this pass. dropped: prefixes
    whose pages are taken back. entered: (slot, pages, tier in each stage, prefixes) of rows that
    entered after all that, in order; tiers are indices in PLACES, prefixes the numbers of those
    that precede the row's own tokens.
    prefill_tokens: tokens of prompts among those that the pass brings, without those of rows that
    were set back. saved_tokens: tokens of prompts that are done without it, known to the first
    stage alone; below 0 in a pass that computes a prefix again.
    """

    rows: tuple[Row, ...]
    token_ids: tuple[int, ...]
    prefill_tokens: int = 0
    scored: tuple[ScoredRow, ...] = ()
    left: tuple[int, ...] = ()
    grown: tuple[tuple[int, int], ...] = ()
    entered: tuple[tuple[int, int, tuple[int, ...], tuple[int, ...]], ...] = ()
    moved: tuple[tuple[int, int, int], ...] = ()
    completed: tuple[tuple[int, int, int], ...] = ()
    dropped: tuple[int, ...] = ()
    saved_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return self.rows[-1].tokens.stop if self.rows else 0

    @cached_property
    def are_single(self) -> bool:
        """True if every row brings one token, as in decoding."""
        return self.num_tokens == len(self.rows)

    @cached_property
    def share_prefixes(self) -> bool:
        """True if tokens of prefixes precede those of any row."""
        return any(row.before for row in self.rows)

    @cached_property
    def positions(self) -> list[int]:
        """Position of each packed token in its sequence."""
        spans = ((row.before + row.position, row.before + row.seq_len) for row in self.rows)
        return [p for first, last in spans for p in range(first, last)]

    @cached_property
    def sampled(self) -> list[Row]:
        return [row for row in self.rows if row.is_sampled]

    @cached_property
    def num_logits(self) -> int:
        """Tokens that the head processes: those sampled or scored after; 0 if there are none."""
        return len(self.sampled) + sum(len(row.token_ids) for row in self.scored)


NO_ROWS = Rows((), ())


class MemoKey(Generic[T]):
    """Key of a result of type T that is derived from the rows of a pass, once for all layers."""


_CHOOSING_RUNS = MemoKey[list[tuple[int, list[Row]]]]()


class Composition:
    """The rows of a pass, divided as a plan's equal rows are; `Pass` divides real ones.

    splits: of each batch, the number of slots in each division, in the order of RowSplit.
    """

    folded_rows = 0  # as in PlacedRows

    def __init__(self, rows: Rows, splits: Sequence[RowSplit]) -> None:
        self.rows = rows
        self._splits = splits
        self._placed: dict[tuple[RowSplit, LayerKind], PlacedRows] = {}

    @property
    def drawn(self) -> float | None:
        """Sum of the sampled tokens' `sampling_share` (cost/ops.py); None if it is not known."""
        return None

    def tokens_of(self, batches: int) -> int:
        """Tokens of so many batches, each of which brings as many as this one."""
        return batches * self.rows.num_tokens

    def placed(self, batch: int, kind: LayerKind) -> PlacedRows:
        """The rows as a batch divides them; derived once for all batches with an equal division."""
        key = self._splits[batch], kind
        placed = self._placed.get(key)
        if placed is None:
            placed = PlacedRows(self.rows, self._divided(*key), kind, self.folded_rows)
            self._placed[key] = placed
        return placed

    def _divided(self, split: RowSplit, kind: LayerKind) -> list[Division]:
        return divided(self.rows, split)


@dataclass(frozen=True, slots=True)
class Division:
    """Division of one row: where its cache lies, and who attends it.

    tier: where it lies; on_host: True if the host attends it there. home: its pages, None if only
    costs are asked for. prefixes: those that precede its own tokens, in their order.
    """

    tier: str
    on_host: bool = False
    home: Home | None = None
    prefixes: tuple[SharedHome, ...] = ()


_KINDS = Division("gpu"), Division("cpu", on_host=True), Division("cpu"), Division("disk")


def divided(rows: Rows, split: RowSplit) -> list[Division]:
    """Division of each row by its slot: the first slots on the device, the last on disk."""
    counts = split.gpu, split.attended, split.streamed, split.disk
    of_slot = [kind for kind, count in zip(_KINDS, counts, strict=True) for _ in range(count)]
    return [
        _KINDS[2] if row.is_prefill and of_slot[row.slot].on_host else of_slot[row.slot]
        for row in rows.rows
    ]


@dataclass(frozen=True)
class PlacedRows:
    """Rows of a pass by where their cache lies and who attends it, in layers of a kind.

    divisions: of each row. folded_rows: decoding rows below which those that share a prefix attend
    it as pages of their own. memo: results that stores derive from the rows, by key and variant
    (see `memoized`).
    """

    rows: Rows
    divisions: Sequence[Division]
    kind: LayerKind = FULL
    folded_rows: int = 0
    memo: dict[tuple[MemoKey, Hashable], Any] = field(default_factory=dict, compare=False)

    def memoized(self, key: MemoKey[T], make: Callable[[], T], variant: Hashable = None) -> T:
        """The result of the first call of `make` for this key and variant, shared by all layers."""
        place = key, variant
        if place not in self.memo:
            self.memo[place] = make()
        return self.memo[place]

    @cached_property
    def _of_slot(self) -> dict[int, Division]:
        pairs = zip(self.rows.rows, self.divisions, strict=True)
        return {row.slot: division for row, division in pairs}

    def home(self, row: Row) -> Home:
        """Pages of a row."""
        home = self._of_slot[row.slot].home
        assert home is not None, "rows of a plan have no pages"
        return home

    def prefixes(self, row: Row) -> tuple[SharedHome, ...]:
        """Prefixes that precede a row's own tokens, in their order."""
        return self._of_slot[row.slot].prefixes

    def host_home(self, row: Row) -> Home:
        """Pages of a row in host memory."""
        home = self.home(row).on("cpu")
        assert home is not None, f"{row} has no pages in host memory"
        return home

    @cached_property
    def _sharing_divisions(self) -> list[tuple[Row, Division]]:
        """Rows that share prefixes."""
        if not self.rows.share_prefixes:
            return []
        pairs = zip(self.rows.rows, self.divisions, strict=True)
        return [pair for pair in pairs if pair[1].prefixes]

    @cached_property
    def folded(self) -> frozenset[int]:
        """Prefixes that decoding rows attend as pages of their own, in front of these.

        They have fewer decoding rows than `folded_rows`, and lie on the tier of all of these rows'
        own pages. If a prefix is folded, so are those after it.
        """
        users, apart = Counter[int](), set[int]()
        for row, division in self._sharing_divisions:
            tier = "gpu" if division.tier == "gpu" else "cpu"
            for shared in division.prefixes if not row.is_prefill else ():
                users[shared.number] += 1
                if shared.home.on(tier) is None:
                    apart.add(shared.number)
        few = (number for number, count in users.items() if count < self.folded_rows)
        return frozenset(few) - apart

    @cached_property
    def _folded_of(self) -> dict[int, list[SharedHome]]:
        """{slot: folded prefixes} of decoding rows."""
        return {
            row.slot: [it for it in division.prefixes if it.number in self.folded]
            for row, division in (self._sharing_divisions if self.folded else ())
            if not row.is_prefill
        }

    def length(self, row: Row) -> int:
        """Tokens that a decoding row attends together: its own, after those of folded prefixes."""
        return row.seq_len + sum(it.end - it.start for it in self._folded_of.get(row.slot, ()))

    def table(self, row: Row, own: Home, in_slot: bool = False) -> np.ndarray:
        """Pages of the tokens that a decoding row attends together, int32.

        own: its pages; in_slot: True if they lie in the streaming slot.
        """
        tables = []
        for shared in self._folded_of.get(row.slot, ()):
            home = self.loaded_prefixes[shared.number] if in_slot else shared.home.on(own.tier)
            assert home is not None, f"prefix {shared.number} doesn't lie beside {row}"
            tables.append(home.table(pages_of(shared.end - shared.start)))
        last = own.table(pages_of(row.seq_len))
        return np.concatenate([*tables, last]) if tables else last

    @cached_property
    def places(self) -> dict[int, int]:
        """{slot: place} of the decoding rows among themselves, in the order of their tokens."""
        decoding = (row.slot for row in self.rows.rows if not row.is_prefill)
        return {slot: place for place, slot in enumerate(decoding)}

    @cached_property
    def sharing(self) -> list[Row]:
        """Decoding rows that attend prefixes apart from their own tokens."""
        return [
            row
            for row, division in self._sharing_divisions
            if not row.is_prefill and division.prefixes[0].number not in self.folded
        ]

    def shared(self, window: int | None) -> list[tuple[SharedHome, list[Row]]]:
        """Each prefix with the decoding rows that attend any of its tokens apart, in their order.

        window: of the layer; None for all tokens.
        """
        users: dict[int, tuple[SharedHome, list[Row]]] = {}
        for row in self.sharing:
            first = first_attended(row, window)
            for shared in self.prefixes(row):
                if first < shared.end and shared.number not in self.folded:
                    users.setdefault(shared.number, (shared, []))[1].append(row)
        return list(users.values())

    @cached_property
    def _streamed_prefixes(self) -> dict[int, tuple[Home, bool]]:
        """{prefix: its pages in host memory, whether prompts attend it} of those that are streamed.

        Rows that the host attends need none there that are folded into them.
        """
        streamed: dict[int, tuple[Home, bool]] = {}
        for row, division in self._sharing_divisions:
            in_slot = division.tier != "gpu" and not division.on_host
            for shared in division.prefixes:
                is_folded = shared.number in self.folded and not row.is_prefill
                home = shared.home.on("cpu")
                if home and (in_slot if is_folded else shared.home.on("gpu") is None):
                    _, prefills = streamed.get(shared.number, (home, False))
                    streamed[shared.number] = home, prefills or row.is_prefill
        return streamed

    @cached_property
    def prefix_copies(self) -> list[tuple[int, int, int, bool]]:
        """Copies that bring prefixes in host memory, as `streamed_copies`."""
        return [
            (self.loaded_prefixes[number].pages[0] + index, page, count, prefills)
            for number, (home, prefills) in self._streamed_prefixes.items()
            for index, page, count in home.runs(0, len(home.pages))
        ]

    @cached_property
    def loaded_prefixes(self) -> dict[int, Home]:
        """{prefix: its pages in the streaming slot, after those of rows} of streamed prefixes."""
        homes, place = {}, sum(streamed_pages_of(row, self.kind) for row in self.streaming)
        for number, (home, _) in self._streamed_prefixes.items():
            pages = tuple(range(place, place + len(home.pages)))
            homes[number] = Home("gpu", pages, most=home.most)
            place += len(pages)
        return homes

    def _select(self, accepts: Callable[[Row, Division], bool]) -> list[Row]:
        pairs = zip(self.rows.rows, self.divisions, strict=True)
        return [row for row, division in pairs if accepts(row, division)]

    @cached_property
    def resident(self) -> list[Row]:
        """Rows whose cache lies on the device."""
        return self._select(lambda row, it: it.tier == "gpu")

    @cached_property
    def stored(self) -> list[Row]:
        """Rows whose cache, or a copy of it, lies in host memory or on disk."""
        return self._select(
            lambda row, it: it.tier != "gpu" or (it.home is not None and it.home.copy is not None)
        )

    @cached_property
    def attended(self) -> list[Row]:
        """Decoding rows that the host attends, where their cache lies."""
        return self._select(lambda row, it: it.on_host)

    @cached_property
    def streamed(self) -> list[Row]:
        """Rows off the device that the device attends."""
        return self._select(lambda row, it: it.tier != "gpu" and not it.on_host)

    @cached_property
    def streaming(self) -> list[Row]:
        """Streamed rows that take room in the streaming slot: all but prompts' first chunks."""
        return [row for row in self.streamed if row.position or not row.is_prefill]

    @cached_property
    def streamed_pages(self) -> dict[int, int]:
        """{slot: first page in the streaming slot} of the rows of `streaming`, side by side."""
        places, page = {}, 0
        for row in self.streaming:
            places[row.slot] = page
            page += streamed_pages_of(row, self.kind)
        return places

    @cached_property
    def streamed_copies(self) -> list[tuple[int, int, int, bool]]:
        """Copies that bring the pages that streamed rows attend, neighbours in one copy.

        (place in the streaming slot, page, number of pages, whether the row prefills).
        """
        copies = []
        for row in self.streaming:
            division, place = self._of_slot[row.slot], self.streamed_pages[row.slot]
            if division.tier != "cpu" or not row.position:
                continue
            first, last = self.kind.first_page(row.position), pages_of(row.position)
            if division.home is None:
                copies.append((place, 0, last - first, row.is_prefill))
                continue
            for index, page, count in division.home.runs(first, last):
                copies.append((place + index - first, page, count, row.is_prefill))
        return copies

    def choosing_runs(self, most: int) -> list[tuple[int, list[Row]]]:
        """(number of chosen rows before, rows) of runs of streamed rows that decode.

        most: rows of a run at most.
        """

        def make() -> list[tuple[int, list[Row]]]:
            decoding = [row for row in self.streamed if not row.is_prefill]
            return [(at, decoding[at : at + most]) for at in range(0, len(decoding), most)]

        return self.memoized(_CHOOSING_RUNS, make, most)

    @cached_property
    def on_disk(self) -> list[Row]:
        """Rows whose cache lies on disk."""
        return self._select(lambda row, it: it.tier == "disk")

    @cached_property
    def _pieces(self) -> list[Piece]:
        return [piece for row in self.stored for piece in cut_at_pages(row, self.kind)]

    @cached_property
    def num_stored(self) -> int:
        """Number of new tokens that leave the device."""
        return sum(piece.count for piece in self._pieces)

    def full_before(self, row: Row) -> tuple[int, int]:
        """First and last of a row's pages that were full before the pass and are attended in it."""
        return self.kind.first_page(row.position), row.position // PAGE_TOKENS

    def filled_by(self, row: Row) -> tuple[int, int]:
        """First and last of a row's pages that the pass fills and leaves within the window."""
        first = max(row.position // PAGE_TOKENS, self.kind.first_page(row.seq_len - 1))
        return first, row.seq_len // PAGE_TOKENS

    @cached_property
    def whole(self) -> list[Piece]:
        """New tokens of rows off the device that fill pages, and leave the device as such."""
        return [piece for piece in self._pieces if piece.count % PAGE_TOKENS == 0]

    @cached_property
    def loose(self) -> list[Piece]:
        """Other new tokens of rows off the device, which are placed one by one on the host."""
        return [piece for piece in self._pieces if piece.count % PAGE_TOKENS]

    @cached_property
    def num_loose(self) -> int:
        """Number of loose tokens."""
        return sum(piece.count for piece in self.loose)

    @cached_property
    def loose_places(self) -> list[tuple[Piece, int]]:
        """(piece, place of its first token on the host) of the loose tokens, side by side."""
        starts = accumulate((piece.count for piece in self.loose), initial=0)
        return list(zip(self.loose, starts, strict=False))

    @cached_property
    def attended_places(self) -> list[int]:
        """Places on the host of the rows that the host attends, if every row brings one token."""
        of_slot = {piece.row.slot: place for piece, place in self.loose_places}
        return [of_slot[row.slot] for row in self.attended]

    def is_on_disk(self, row: Row) -> bool:
        """True if a row's cache lies on disk."""
        return self._of_slot[row.slot].tier == "disk"

    @cached_property
    def loose_runs(self) -> list[tuple[int, slice]]:
        """(first place on the host, packed tokens) of the loose tokens, in runs."""
        return token_runs(self.loose)

    @cached_property
    def attended_runs(self) -> list[tuple[int, slice]]:
        """(first place on the host, packed tokens) of the rows that the host attends, in runs."""
        return token_runs(self.attended)


def first_attended(row: Row, window: int | None) -> int:
    """First token, prefixes included, that a row's first new token attends."""
    return 0 if window is None else max(0, row.before + row.position + 1 - window)


def may_attend_apart(row: Row, window: int | None) -> bool:
    """True if a prompt's chunk may attend its prefixes apart from its own tokens, on a CPU.

    It is a first chunk, all of whose tokens attend all prefixes. window: as for first_attended.
    """
    attends_all = window is None or row.before + row.seq_len <= window
    return not row.position and attends_all


def streamed_pages_of(row: Row, kind: LayerKind) -> int:
    """Pages that a row takes in the streaming slot: of what it had, and of a decoded token."""
    return kind.pages_of(row.position if row.is_prefill else row.seq_len)


def token_runs(parts: Sequence[Row] | Sequence[Piece]) -> list[tuple[int, slice]]:
    """Runs of neighbouring packed tokens: (number of tokens before the run, its tokens)."""
    runs: list[tuple[int, slice]] = []
    place = 0
    for tokens in (part.tokens for part in parts):
        if runs and runs[-1][1].stop == tokens.start:
            first, before = runs[-1]
            runs[-1] = first, slice(before.start, tokens.stop)
        else:
            runs.append((place, tokens))
        place += tokens.stop - tokens.start
    return runs


def decoding_runs(rows: Iterable[Row], most: int | None = None) -> Iterator[list[Row]]:
    """Yield runs of decoding rows that are neighbours among the packed tokens.

    most: rows of a run at most; None for no limit.
    """
    run: list[Row] = []
    for row in rows:
        if run and (len(run) == most or row.offset != run[-1].offset + 1):
            yield run
            run = []
        run.append(row)
    if run:
        yield run
