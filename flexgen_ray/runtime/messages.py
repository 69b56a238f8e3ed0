"""Messages between a pipeline's stages: the header of a pass, and the tokens sampled in it.

A message is a msgpack map of named fields. Several records of one kind (rows, scores, ...) are a
table: a list for each field, in which a value that all records share stands only once. Tables
without records are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from operator import attrgetter
from typing import Any, TypeVar

import msgpack

from flexgen_ray.kernels.sampling import Penalties, SamplingRow
from flexgen_ray.layout.rows import Row, Rows, ScoredRow
from flexgen_ray.request import Score, SlotScores
from flexgen_ray.runtime.ring import ChannelClosed

T = TypeVar("T")
Table = dict[str, tuple]

# A row's offset follows from the rows before it.
_ROW = ("slot", "position", "num_new_tokens", "is_sampled", "is_prefill", "before")
_SAMPLING = tuple(each.name for each in fields(SamplingRow))
_SCORED = tuple(each.name for each in fields(ScoredRow))
_NUM_SCORES = ("slot", "num_scores")
_NOT_FINITE = ("slot", "position")
_GROWN = ("slot", "pages")
_ENTERED = ("slot", "pages", "tiers", "prefixes")
_COMPLETED = ("slot", "prefix", "tokens")
_MOVED = ("slot", "from_batch", "from_slot")


@dataclass(frozen=True)
class Header:
    """Rows of one pass of one batch, composed by the first stage.

    sampling_rows: for each sampled row, settings that choose its next token.
    request_indices: for each sampled row, the index of its request.
    is_last: True if no visit follows this one.
    """

    visit: int
    batch: int
    rows: Rows
    sampling_rows: list[SamplingRow]
    request_indices: list[int]
    is_last: bool = False

    def encode(self) -> bytes:
        """Message with the header, without what the receiver derives."""
        settings = map(attrgetter(*_SAMPLING), self.sampling_rows)
        sampled = zip(self.request_indices, settings, strict=True)
        return _pack(
            visit=self.visit,
            batch=self.batch,
            is_last=self.is_last,
            prefill_tokens=self.rows.prefill_tokens,
            left=self.rows.left or {},
            dropped=self.rows.dropped or {},
            completed=_table(_COMPLETED, self.rows.completed),
            grown=_table(_GROWN, self.rows.grown),
            entered=_table(_ENTERED, self.rows.entered),
            moved=_table(_MOVED, self.rows.moved),
            rows=_table(_ROW, map(attrgetter(*_ROW), self.rows.rows)),
            sampled=_table(("request", *_SAMPLING), ((index, *each) for index, each in sampled)),
            scored=_table(_SCORED, map(attrgetter(*_SCORED), self.rows.scored)),
        )

    @staticmethod
    def decode(message: bytes) -> Header:
        """Inverse of encode, except that the rows' token ids stay with the first stage.

        Raises ChannelClosed if the message is malformed.
        """
        return _unpack(message, _header)


@dataclass(frozen=True)
class SampledTokens:
    """Tokens that the last stage sampled in a pass, and the scores that were asked for.

    token_ids: in the order of the pass's sampled rows.
    not_finite: {slot: position of the first token whose logits aren't finite}; the token sampled
    for such a slot is void, and its scores are left out.
    """

    visit: int
    batch: int
    token_ids: list[int]
    scores: SlotScores = field(default_factory=list)
    not_finite: dict[int, int] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Message with the tokens, their scores one slot's after the other's."""
        return _pack(
            visit=self.visit,
            batch=self.batch,
            token_ids=self.token_ids,
            num_scores=_table(_NUM_SCORES, ((slot, len(values)) for slot, values in self.scores)),
            scores=_table(Score._fields, (each for _, values in self.scores for each in values)),
            not_finite=_table(_NOT_FINITE, self.not_finite.items()),
        )

    @staticmethod
    def decode(message: bytes) -> SampledTokens:
        """Inverse of encode. Raises ChannelClosed if the message is malformed."""
        return _unpack(message, _sampled_tokens)


def _header(message: dict[str, Any]) -> Header:
    """Header from the fields of its message."""
    rows, offset = [], 0
    for slot, position, count, *marks in _records(message, "rows", _ROW):
        rows.append(Row(slot, position, count, offset, *marks))
        offset += count
    if table := message.get("sampled"):
        table["penalties"] = tuple(each and Penalties(**each) for each in table["penalties"])
    sampled = [*_records(message, "sampled", ("request", *_SAMPLING))]
    scored = tuple(ScoredRow(*values) for values in _records(message, "scored", _SCORED))
    grown = tuple((slot, pages) for slot, pages in _records(message, "grown", _GROWN))
    entered = tuple(
        (slot, pages, tuple(tiers), tuple(prefixes))
        for slot, pages, tiers, prefixes in _records(message, "entered", _ENTERED)
    )
    left, dropped = tuple(message.get("left", ())), tuple(message.get("dropped", ()))
    moved = tuple((slot, of, there) for slot, of, there in _records(message, "moved", _MOVED))
    completed = tuple(_records(message, "completed", _COMPLETED))
    return Header(
        message["visit"],
        message["batch"],
        Rows(
            tuple(rows),
            (),
            message["prefill_tokens"],
            scored,
            left,
            grown,
            entered,
            moved,
            completed,
            dropped,
        ),  # fmt: skip
        [SamplingRow(*values) for _, *values in sampled],
        [values[0] for values in sampled],
        message["is_last"],
    )


def _sampled_tokens(message: dict[str, Any]) -> SampledTokens:
    """Sampled tokens from the fields of their message."""
    scores = map(Score._make, _records(message, "scores", Score._fields))
    return SampledTokens(
        message["visit"],
        message["batch"],
        list(message["token_ids"]),
        [(slot, [*islice(scores, n)]) for slot, n in _records(message, "num_scores", _NUM_SCORES)],
        dict(_records(message, "not_finite", _NOT_FINITE)),
    )


def _pack(**message: Any) -> bytes:
    """Bytes of a message, without its empty tables."""
    return _bytes({name: value for name, value in message.items() if value != {}})


def _bytes(value: Any) -> bytes:
    """Value in msgpack; a record within it, such as penalties, is a map of its fields."""
    return msgpack.packb(value, default=vars)


def _unpack(message: bytes, build: Callable[[dict[str, Any]], T]) -> T:
    """Result of `build` for a message's fields, in which arrays are tuples."""
    try:
        return build(msgpack.unpackb(message, use_list=False, ext_hook=_refuse))
    except Exception as error:  # whatever is wrong with bytes that come from elsewhere
        raise ChannelClosed(f"the stage before sent a malformed message: {error!r}") from error


def _refuse(code: int, _: bytes) -> None:
    raise ValueError(f"extension type {code}")


def _table(names: Sequence[str], records: Iterable[tuple]) -> Table:
    """Columns of records, the first of them whole; {} for no records.

    names: one for each value of a record, in order.
    """
    columns = dict(zip(names, zip(*records, strict=True), strict=False))
    return {
        name: column if name == names[0] else _shorten(column) for name, column in columns.items()
    }


def _shorten(column: tuple) -> tuple:
    """A column of one value if all of its values are the same, bit for bit."""
    same = column[:1] * len(column)
    is_same = len({*map(id, column)}) == 1
    # Numbers may be equal and yet differ, as 0.0 and -0.0 or 1 and 1.0 do, but their bytes then do.
    is_same = is_same or (column == same and _bytes(column) == _bytes(same))
    return column[:1] if is_same else column


def _records(message: dict[str, Any], name: str, names: Sequence[str]) -> Iterator[tuple]:
    """Records of a table of a message, each with its values in the order of the names."""
    table: Table = message.get(name) or dict.fromkeys(names, ())
    count = len(table[names[0]])
    columns = (table[each] for each in names)
    return zip(*(c * count if len(c) == 1 else c for c in columns), strict=True)
