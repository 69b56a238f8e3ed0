"""Rows in a given order, though they come in another. What comes early waits in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

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
        return self._waiting.is_empty

    def recover(self, is_wanted: Callable[[dict], bool]) -> Iterator[dict]:
        """Rows that wait since an earlier run and are wanted; others may still be there."""
        for start, end, row in self._waiting.rows():
            self._end = end
            if is_wanted(row):
                self._places[row["custom_id"]] = start, end
                yield row

    def begin(self, num_bytes: int, custom_ids: Iterable[str], moved: Iterable[dict] = ()) -> None:
        """num_bytes: of the file's rows that stay; custom_ids: of all that are to come or wait, in
        their order; moved: rows beyond those bytes that wait from now on."""
        self._waiting.truncate(self._end)
        for row in moved:
            self._keep(row)
        self._waiting.sync()
        self._file.truncate(num_bytes)
        self._order = iter(custom_ids)
        self._advance()

    def append(self, row: dict) -> None:
        """At once if it is this row's turn, and then those that waited for it."""
        if row["custom_id"] == self._next:
            self._file.append(row)
            self._advance()
            return
        self._keep(row)

    def _keep(self, row: dict) -> None:
        start = self._waiting.num_bytes
        self._waiting.append(row)
        self._places[row["custom_id"]] = start, self._waiting.num_bytes

    def _advance(self) -> None:
        while (custom_id := next(self._order, None)) in self._places:
            self._file.append(self._waiting.read(*self._places.pop(custom_id)))
        self._next = custom_id
        if not self._places and self._waiting.num_bytes:
            self._waiting.truncate(0)
