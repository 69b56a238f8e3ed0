"""Rows in a given order, though they come in another. What comes early waits in a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flexgen_ray.io.line_file import LineFile


class InOrder:
    """Passes rows on to `file` when it is their turn; of those that wait in `waiting`, which a kill
    doesn't lose, memory holds only the places."""

    def __init__(self, file: LineFile, waiting: LineFile) -> None:
        self._file = file
        self._waiting = waiting
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0
        self._order: Iterator[str] = iter(())
        self._next: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no row waits, nor might still be wanted."""
        return self._waiting.path.stat().st_size == 0

    def recover(self, written: set[str]) -> Iterator[dict]:
        """Rows that wait since an earlier run; of written ids some may still be there."""
        for start, end, row in self._waiting.rows():
            self._end = end
            if row["custom_id"] not in written:
                self._places[row["custom_id"]] = start, end
                yield row

    def begin(self, custom_ids: Iterable[str]) -> None:
        """custom_ids: of all rows that are to come or wait, in their order."""
        self._waiting.truncate(self._end)
        self._order = iter(custom_ids)
        self._advance()

    def append(self, row: dict) -> None:
        """At once if it is this row's turn, and then those that waited for it."""
        if row["custom_id"] == self._next:
            self._file.append(row)
            self._advance()
            return
        start = self._waiting.num_bytes
        self._waiting.append(row)
        self._places[row["custom_id"]] = start, self._waiting.num_bytes

    def _advance(self) -> None:
        while (custom_id := next(self._order, None)) in self._places:
            self._file.append(self._waiting.read(*self._places.pop(custom_id)))
        self._next = custom_id
        if not self._places and self._waiting.num_bytes:
            self._waiting.truncate(0)
