"""Scheduler of requests: assigns them to slots, composes each pass, and ends finished requests.

The batches of all blocks in flight have up to gpu_batch_size slots each, numbered from 0 in every
batch. A request enters a free slot when pages of the cache are expected to suffice for all rows
until their ends (layout/admission.py). For each batch, one pass after the other:

    compose           finished rows give their pages back, rows whose pages are full get one more,
                      and waiting requests take free slots and pages; each decoding slot brings its
                      newest token, and prompts fill the rest of cell_tokens, the last one perhaps
                      in chunks
    sampling_rows     settings for the slots whose last token the pass brings
    accept            appends the sampled tokens; a request with its last token leaves its slot

Knows tokens; no tensors, no tiers.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from math import ceil

from flexgen_ray.config import PAGE_TOKENS
from flexgen_ray.kernels.sampling import SamplingRow
from flexgen_ray.layout.admission import Admission, are_alike
from flexgen_ray.layout.answers import AnswerLengths
from flexgen_ray.layout.pages import pages_of
from flexgen_ray.layout.rows import Row, Rows, ScoredRow
from flexgen_ray.request import Finished, Request, SamplingParams, Score, SlotScores
from flexgen_ray.runtime.next_tokens import FindStop, NextTokens, not_finite_message
from flexgen_ray.runtime.prefix_book import PrefixBook
from flexgen_ray.runtime.prefixes import Prefix, rank_groups
from flexgen_ray.runtime.sequence import Sequence

Entered = tuple[int, int, tuple[int, ...], tuple[int, ...]]  # as layout.rows.Rows has them
MOST_GROUPS = 16  # groups among which a row is looked for; others wait for their prefixes


@dataclass
class Scheduler:
    """Composes the passes of a run, and follows every request from its queue to its end.

    gpu_batch_size: slots of a batch; num_batches: batches of all blocks in flight.
    cell_tokens: most tokens of one batch in one pass.
    find_stop(token ids, index of the answer's first token, params): returns the stop string that
    the newest token completes, or None.
    seed: for requests without a seed of their own.
    explain(position): error message for a request whose logits aren't finite at a token.
    admission: books of the pages that rows need; None if slots are all that they need.
    recomputed_tokens: tokens of this run that were computed again, for rows that were set back.
    least_batches: batches that overlap; when few rows are left, they gather in no fewer.
    """

    gpu_batch_size: int
    num_batches: int
    cell_tokens: int
    eos_token_ids: frozenset[int]
    find_stop: FindStop | None = None
    seed: int = 0
    explain: Callable[[int], str] = field(default_factory=lambda: not_finite_message)
    admission: Admission | None = None
    recomputed_tokens: int = 0
    least_batches: int = 1
    _waiting: list[Request] = field(default_factory=list)
    _finished: deque[Finished] = field(default_factory=deque)
    _accepted: deque[tuple[int, int]] = field(default_factory=deque)
    _scored: deque[tuple[int, list[Score]]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        pages = self.admission
        self._prefixes = PrefixBook(
            pages.prefix_pages if pages else 0, pages.prefix_slot if pages else None
        )
        # Ranks of prefixes, by number, and of none (-1): so groups of requests follow each other.
        self._ranks: dict[int, int] = {}
        self._next = NextTokens(self.eos_token_ids, self.find_stop, self.seed)
        self._slots: list[dict[int, Sequence]] = [{} for _ in range(self.num_batches)]
        self._left: list[list[int]] = [[] for _ in range(self.num_batches)]
        self._due = self._due_at_first()
        self._are_alike = True
        self._answers = AnswerLengths()
        # Decisions rest on what each batch was when it was composed last, for tokens of the others
        # may arrive sooner or later: tokens of its answers, and (tokens, was cut) of those that
        # ended since.
        self._under_way: list[list[int]] = [[] for _ in range(self.num_batches)]
        self._ended: list[list[tuple[int, bool]]] = [[] for _ in range(self.num_batches)]
        self._learned = [0] * self.num_batches  # version of what was learned by then
        self._waiting_tokens = self._num_entered = 0
        # Tokens that were computed before, by index: of rows that were set back, and of prefixes.
        self._cached_before: dict[int, int] = {}
        # Tokens of prefixes, by number, that no row has counted as part of its prompt.
        self._unclaimed: dict[int, int] = {}
        self._saved_tokens = 0  # since the last pass was packed
        self._starving: tuple[int, int] | None = None
        # Rows on their way to another batch, by that one: (slot, batch, slot there), sequence.
        self._moving: list[list[tuple[tuple[int, int, int], Sequence]]]
        self._moving = [[] for _ in range(self.num_batches)]

    def clear(self) -> None:
        """Drop the requests and results that an interrupted run left behind."""
        for queue in (self._waiting, self._finished, self._accepted, self._scored):
            queue.clear()
        for slots in self._slots:
            slots.clear()
        self._cached_before.clear()
        self._unclaimed.clear()
        self._answers.clear()
        self._prefixes.clear()
        self._ranks.clear()
        for batch in range(self.num_batches):
            self._left[batch], self._ended[batch], self._under_way[batch] = [], [], []
            self._moving[batch], self._learned[batch] = [], 0
        self._due = self._due_at_first()
        self._starving, self.recomputed_tokens, self._saved_tokens = None, 0, 0
        if self.admission is not None:
            self.admission.clear()

    def _due_at_first(self) -> list[float]:
        """Rows that are due to enter each batch, if they enter one by one; batches take turns."""
        return [1.0 - batch / self.num_batches for batch in range(self.num_batches)]

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests: those that share prefixes one after the other, the longest first."""
        added = list(requests)
        self._prefixes.add(added)
        ranks = rank_groups(added, self._prefixes.of)
        first = 1 + max(self._ranks.values(), default=-1)
        for request in added:
            self._ranks.setdefault(self._group(request), first + ranks[request.index])
        self._waiting = sorted([*self._waiting, *added], key=self._order)
        left = [request.max_tokens - len(request.generated) for request in self._waiting]
        self._waiting_tokens = sum(left)
        self._are_alike = are_alike(left)

    @property
    def is_done(self) -> bool:
        """True if no further pass has rows; may be asked from any thread."""
        return not self._waiting and not any(self._slots) and not any(self._moving)

    def compose(self, batch: int) -> Rows:
        """Rows of a batch's next pass: each decoding row's token, then prompts as far as they fit.

        Prompts are taken in the order in which they got their slots, so at most one is in chunks.
        A prefix is a prompt of its own. It is there for rows that enter from the next time on that
        its batch is composed, which waits for the batch's last writes.
        """
        slots, left = self._slots[batch], self._left[batch]
        self._left[batch] = []
        grown: list[tuple[int, int]] = []
        waiting_for_pages: set[int] = set()
        arrived = self._moving[batch]
        slots.update((slot, sequence) for (slot, *_), sequence in arrived)
        self._moving[batch] = []
        if self.admission is not None:
            for slot in left:
                self.admission.leave(batch, slot)
                self._prefixes.leave((batch, slot))
            self._look_at(batch)
            waiting_for_pages = self._grow(batch, left, grown)
            self._give_rows(batch)
        completed = self._complete_prefixes(batch)
        dropped = self._prefixes.take_unused()
        entered = [*self._begin_prefixes(batch, dropped), *self._fill(batch, slots)]
        self._under_way[batch] = [it.num_generated for it in self._rows_of(batch)]
        decoding = [
            slot
            for slot, sequence in slots.items()
            if len(sequence.token_ids) - sequence.cached == 1 and slot not in waiting_for_pages
        ]
        room = self.cell_tokens - len(decoding)
        counts = dict.fromkeys(decoding, 1)
        for slot, sequence in slots.items():
            if slot not in counts and slot not in waiting_for_pages:
                count = min(room, len(sequence.token_ids) - sequence.cached)
                room -= count
                if count:
                    counts[slot] = count
        rows = self._pack(batch, counts)
        moved = tuple(places for places, _ in arrived)
        return replace(
            rows, left=tuple(left), grown=tuple(grown), entered=tuple(entered), moved=moved,
            completed=tuple(completed), dropped=tuple(dropped),
        )  # fmt: skip

    def sampling_rows(self, batch: int, slots: list[int]) -> list[SamplingRow]:
        """Settings that choose the next token of each slot."""
        return [self._next.sampling_row(self._slots[batch][slot]) for slot in slots]

    def request_indices(self, batch: int, slots: list[int]) -> list[int]:
        """Index of the request in each slot."""
        return [self._slots[batch][slot].request.index for slot in slots]

    def accept(
        self,
        batch: int,
        slots: list[int],
        token_ids: list[int],
        scores: SlotScores | None = None,
        not_finite: dict[int, int] | None = None,
    ) -> None:
        """Append sampled tokens and scores; requests that end leave their slots.

        slots, token_ids: of the sampled rows, in order.
        not_finite: {slot: position}, see messages.SampledTokens; these requests fail.
        """
        not_finite = not_finite or {}
        for slot, place in not_finite.items():
            index = self._slots[batch][slot].request.index
            self._finished.append(Finished(index, [], "error", error=self.explain(place)))
            self._leave(batch, slot)
        scored = [(self._slots[batch][slot], values) for slot, values in scores or ()]
        for sequence, values in scored:
            sequence.scores += values
        for slot, token in zip(slots, token_ids, strict=True):
            if slot in not_finite:
                continue
            sequence = self._slots[batch][slot]
            sequence.append(token)
            self._accepted.append((sequence.request.index, token))
            done = self._next.finished_by(sequence, token)
            if done is not None:
                self._ended[batch].append((len(done.token_ids), done.finish_reason == "length"))
                self._finished.append(done)
                self._leave(batch, slot)
        self._scored.extend((sequence.request.index, values) for sequence, values in scored)

    def take_finished(self) -> Iterator[Finished]:
        """Requests that finished since the last call; may be called from another thread."""
        while self._finished:
            yield self._finished.popleft()

    def take_accepted(self) -> Iterator[tuple[int, int]]:
        """(request, token) for each token since the last call; from any thread."""
        while self._accepted:
            yield self._accepted.popleft()

    def take_scored(self) -> Iterator[tuple[int, list[Score]]]:
        """(request, its new scores) since the last call.

        Called before take_accepted, it yields no score of a token that is not yielded there.
        """
        while self._scored:
            yield self._scored.popleft()

    def _leave(self, batch: int, slot: int) -> None:
        """Free a slot; its pages are given back where the batch's next pass is composed."""
        del self._slots[batch][slot]
        self._left[batch].append(slot)

    def _look_at(self, batch: int) -> None:
        """Learn from answers that ended, and take note of the batch's rows and of their ends."""
        for tokens, was_cut in self._ended[batch]:
            self._answers.add(tokens, was_cut)
        self._ended[batch].clear()
        self._answers.update(chain(*self._under_way))
        has_news = self._learned[batch] != self._answers.version
        self._learned[batch] = self._answers.version
        for sequence in self._slots[batch].values():
            count, before = len(sequence.token_ids), sequence.before
            sequence.num_tokens = count - before
            if has_news or sequence.num_tokens >= sequence.expected_tokens:
                sequence.expected_tokens = self._expected(sequence.request, count) - before

    def _expected(self, request: Request, tokens: int) -> int:
        """Tokens that a request is expected to end with, which has so many now.

        An answer that only the context limits is expected to be as long as a plan expects it; once
        it is longer, it is expected to become twice as long as it is.
        """
        prompt_len = len(request.prompt_token_ids)
        answer, most = tokens - prompt_len, request.max_tokens
        if request.is_open:
            most = min(most, max(request.expected_tokens, 2 * answer))
        if self._answers.are_known and self._next.may_end(request):
            return prompt_len + ceil(self._answers.expected(answer, most))
        return prompt_len + most

    def _grow(self, batch: int, left: list[int], grown: list[tuple[int, int]]) -> set[int]:
        """Give another page to rows whose pages are full, the oldest first.

        If none is free, the youngest row whose pages would help is set back: it leaves the batch,
        and is computed again later, with its tokens so far as part of the prompt. A row for which
        no younger one can be set back skips the pass. The oldest row of all batches is never set
        back, and the others make room for it, so every request ends.

        left, grown: the lists to which this adds. Returns the slots that skip the pass.
        """
        admission, slots = self._pages, self._slots[batch]
        skipping: set[int] = set()
        # A row takes one token in a pass, so it needs a page with the first token of one.
        full = [it for it in slots if slots[it].num_tokens % PAGE_TOKENS == 1]
        full = [it for it in full if not slots[it].is_prefix]
        for slot in sorted(full, key=lambda it: slots[it].age):
            sequence = slots.get(slot)
            if sequence is None or pages_of(sequence.num_tokens) <= admission.pages(batch, slot):
                continue
            while not admission.grows(batch, slot):
                if not self._set_back_for((batch, slot), batch, left):
                    skipping.add(slot)
                    break
            else:
                grown.append((slot, 1))
                if self._starving == (batch, slot):
                    self._starving = None
        if self._starving is not None and self._starving[0] != batch:
            self._set_back_for(self._starving, batch, left)
        if skipping:
            # Until it has its page, nothing enters, and the other batches make room.
            oldest = admission.oldest
            if oldest[0] == batch and oldest[1] in skipping:
                self._starving = oldest
        grown[:] = [each for each in grown if each[0] in slots]
        return skipping

    def _set_back_for(self, lacking: tuple[int, int], batch: int, left: list[int]) -> bool:
        """Set back the batch's youngest row whose pages help an older one, which lacks a page.

        lacking: (batch, slot) of the older one. Returns False if there is no such row.
        """
        slots, admission = self._slots[batch], self._pages
        age = self._slots[lacking[0]][lacking[1]].age
        victims = [
            (sequence.age, slot)
            for slot, sequence in slots.items()
            if not sequence.is_prefix
            and sequence.age > age
            and admission.helps((batch, slot), lacking)
        ]
        if not victims:
            return False
        slot = max(victims)[1]
        sequence = slots.pop(slot)
        admission.leave(batch, slot)
        self._prefixes.leave((batch, slot))
        self._prefixes.wait(sequence.request)
        left.append(slot)
        index = sequence.request.index
        self._cached_before[index] = max(sequence.cached, self._cached_before.get(index, 0))
        request = replace(sequence.request, generated=sequence.generated, scores=sequence.scores)
        insort(self._waiting, request, key=self._order)
        self._waiting_tokens += request.max_tokens - len(request.generated)
        return True

    @property
    def _pages(self) -> Admission:
        assert self.admission is not None, "asked only if rows need pages"
        return self.admission

    def _give_rows(self, batch: int) -> None:
        """Give all rows of the emptiest batch to others, if none waits and they have the slots.

        Each batch takes its time however few its rows are. The rows wait for the others' next
        passes with their pages, which none of this batch's ops under way touch any more.
        """
        admission, slots = self._pages, self._slots[batch]
        sizes = {of: len(answers) for of, answers in enumerate(self._under_way) if answers}
        sizes[batch] = len(slots)
        others = [of for of in sizes if of != batch]
        if (
            not slots
            or self._waiting
            or self._starving
            or any(self._moving)
            or len(others) < self.least_batches
            or any(len(it.token_ids) - it.cached != 1 for it in slots.values())
            or any((len(slots), batch) > (sizes[of], of) for of in others)
            or not admission.may_move(batch)
            or not self._prefixes.may_move()
        ):
            return
        free = {of: admission.free_slots(of, self.gpu_batch_size) for of in others}
        if sum(map(len, free.values())) < len(slots):
            return
        for slot, sequence in sorted(slots.items()):
            # The batch with the most room comes first, so that batches stay alike.
            of = max(others, key=lambda it: (len(free[it]), -it))
            place = free[of].pop(0)
            admission.move((batch, slot), (of, place))
            self._prefixes.move((batch, slot), (of, place))
            self._moving[of].append(((place, batch, slot), sequence))
        slots.clear()

    def _complete_prefixes(self, batch: int) -> list[tuple[int, int, int]]:
        """Free the slots of prefixes that are computed; as layout.rows.Rows has these."""
        slots, completed = self._slots[batch], []
        done = [it for it in slots if slots[it].is_prefix and not _tokens_left(slots[it])]
        for slot in done:
            del slots[slot]
            self._pages.end_prefix(batch, slot)
            prefix = self._prefixes.complete((batch, slot))
            self._note_computed(prefix)
            completed.append((slot, prefix.number, prefix.tokens))
        return completed

    def _begin_prefixes(self, batch: int, dropped: list[int]) -> list[Entered]:
        """Compute the prefixes of requests that are about to enter, in free slots of a batch.

        They are computed for as many requests as there are free slots in all batches, and for
        those of one batch ahead. dropped: to which those are added whose pages are needed.
        Returns what entered, as layout.rows.Rows has them.
        """
        if not self._prefixes.has_waiting:
            return []
        slots, entered = self._slots[batch], []
        others = sum(len(answers) for of, answers in enumerate(self._under_way) if of != batch)
        ahead = self.gpu_batch_size * (self.num_batches + 1) - others - len(self._rows_of(batch))
        free = [slot for slot in range(self.gpu_batch_size) if slot not in slots]
        # Groups that come first keep what is there for them, or none would ever find all of it.
        wanted: set[int] = set()
        for start, stop in self._groups():
            if ahead <= 0 or not free:
                break
            ahead -= stop - start
            deepest = self._prefixes.of(self._waiting[start])
            wanted |= {it.number for it in deepest.chain} if deepest else set()
            prefix = deepest and self._prefixes.next_to_compute(deepest)
            if self.gpu_batch_size == 1 and self._may_enter(deepest, batch):
                break  # the batch's only slot is that of a row which is ready
            if prefix is None or not self._prefixes.fits_batch(prefix.parent, batch):
                continue
            unused = self._prefixes.begin(prefix, (batch, free[0]), wanted)
            if unused is None:
                break
            dropped += unused
            slot = free.pop(0)
            self._pages.begin_prefix(batch, slot)
            slots[slot] = _sequence_of(prefix)
            chain = tuple(it.number for it in prefix.chain[:-1])
            entered.append((slot, prefix.pages, self._pages.prefix_places, chain))
        return entered

    def _note_computed(self, prefix: Prefix) -> None:
        """Count a prefix as computed; some row then has its tokens as part of its prompt."""
        index = _index_of(prefix)
        if index not in self._cached_before:
            self._cached_before[index] = prefix.end
            self._unclaimed[prefix.number] = prefix.tokens

    def _note_saved(self, sequence: Sequence) -> None:
        """Count the prompt tokens that a row needn't bring, when it enters for the first time."""
        if sequence.prefix is not None and sequence.request.index not in self._cached_before:
            claimed = (self._unclaimed.pop(it.number, 0) for it in sequence.prefix.chain)
            self._saved_tokens += sequence.before - sum(claimed)

    def _groups(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of the waiting requests that share a prefix, or share none, in order."""
        start = 0
        while start < len(self._waiting):
            rank = self._order(self._waiting[start])[0]
            # Ranks are whole numbers, so no request has this key.
            after: tuple[float, ...] = (rank + 0.5,)
            stop = bisect_left(self._waiting, after, start, key=self._order)
            yield start, stop
            start = stop

    def _order(self, request: Request) -> tuple[float, ...]:
        tokens = len(request.prompt_token_ids) + len(request.generated)
        return self._ranks[self._group(request)], -request.max_seq_len, -tokens

    def _group(self, request: Request) -> int:
        """Number of the deepest prefix that a request shares; -1 for none."""
        prefix = self._prefixes.of(request)
        return prefix.number if prefix else -1

    def _rows_of(self, batch: int) -> list[Sequence]:
        """Rows of a batch that are under way, without prefixes that it computes."""
        return [it for it in self._slots[batch].values() if not it.is_prefix]

    def _fill(self, batch: int, slots: dict[int, Sequence]) -> list[Entered]:
        """Move waiting requests into free slots; when few are left, each batch gets its share.

        Returns those that entered, as layout.rows.Rows has them.
        """
        if self._starving is not None:
            return []
        others = sum(len(answers) for of, answers in enumerate(self._under_way) if of != batch)
        rows = len(self._rows_of(batch))
        share = -(-(len(self._waiting) + rows + others) // self.num_batches)
        room = min(self.gpu_batch_size - len(slots), share - rows, self._entries_due(batch))
        free = (slot for slot in range(self.gpu_batch_size) if slot not in slots)
        entered: list[Entered] = []
        for slot in list(islice(free, max(0, min(room, len(self._waiting))))):
            chosen = self._next_waiting(batch, slot, room - len(entered))
            if chosen is None:
                break
            place, sequence, tiers = chosen
            request, slots[slot] = sequence.request, sequence
            self._num_entered += 1
            self._due[batch] -= 1
            self._prefixes.enter(sequence.prefix, (batch, slot))
            self._note_saved(sequence)
            chain = tuple(it.number for it in sequence.prefix.chain) if sequence.prefix else ()
            entered.append((slot, pages_of(sequence.num_tokens), tiers, chain))
            self._waiting_tokens -= request.max_tokens - len(request.generated)
            # Removed last, so that `is_done` is not True in between.
            del self._waiting[place]
        return entered

    def _entries_due(self, batch: int) -> int:
        """Most rows that enter a batch in this pass; equal ones may have to enter one by one."""
        if self.admission is None or not self._waiting or not self._are_alike:
            return self.gpu_batch_size
        usual, slots = self._waiting[len(self._waiting) // 2], self.gpu_batch_size
        if self._next.may_end(usual) and not self._answers.reach_their_most:
            return slots
        pace = self.admission.pace(
            self._sequence(usual), len(self._waiting), slots * self.num_batches
        )
        if pace is None:
            return slots
        # An entry for which there are no pages isn't made up for: rows would be side by side. And
        # of rows that entered together before, no more than one is held against those that wait.
        self._due[batch] = max(-1.0, min(self._due[batch], 1.0)) + pace / self.num_batches
        return max(int(self._due[batch]), not self._rows_of(batch))

    def _next_waiting(
        self, batch: int, slot: int, rows: int
    ) -> tuple[int, Sequence, tuple[int, ...]] | None:
        """(place in the queue, sequence, tiers) of what takes a slot; None if nothing can now.

        It is the longest, if so many `rows` could still enter, the others being the shortest; else
        the shortest. So batches fill their slots and their pages. But an answer that takes longer
        than all others together begins as soon as it can.
        """
        if self.admission is None:
            return 0, self._sequence(self._waiting[0]), ()
        for start, stop in islice(self._groups(), MOST_GROUPS):
            prefix = self._prefixes.of(self._waiting[start])
            if self._may_enter(prefix, batch):
                return self._next_of_group(batch, slot, rows, (start, stop - 1))
        return None

    def _may_enter(self, prefix: Prefix | None, batch: int) -> bool:
        """True if what a row would share is there, and beside what its batch reads."""
        return self._prefixes.is_ready(prefix) and self._prefixes.fits_batch(prefix, batch)

    def _next_of_group(
        self, batch: int, slot: int, rows: int, ends: tuple[int, int]
    ) -> tuple[int, Sequence, tuple[int, ...]] | None:
        """As _next_waiting, from a group; ends: places in the queue of its longest and shortest."""
        assert self.admission is not None
        longest, shortest = (self._sequence(self._waiting[place]) for place in ends)
        has_share = self.admission.has_share
        passes = self._waiting_tokens / (self.gpu_batch_size * self.num_batches)
        is_urgent = longest.request.max_tokens >= passes or not self._rows_of(batch)
        choices = []
        if is_urgent or has_share(batch, (longest, 1), (shortest, rows - 1)):
            choices.append((ends[0], longest))
        if has_share(batch, (shortest, 1)):
            choices.append((ends[1], shortest))
        for place, sequence in choices:
            tiers = self.admission.enters(batch, slot, sequence)
            if tiers is not None:
                return place, sequence, tiers
        return None

    def _sequence(self, request: Request) -> Sequence:
        """Sequence of a request that is about to enter."""
        tokens, prefix = request.prompt_token_ids + request.generated, self._prefixes.of(request)
        expected = self._expected(request, len(tokens)) - (prefix.end if prefix else 0)
        return Sequence(
            request, tokens, [*request.scores], len(tokens), self._num_entered,
            expected_tokens=expected, prefix=prefix,
        )  # fmt: skip

    def _pack(self, batch: int, counts: dict[int, int]) -> Rows:
        """Rows with their tokens side by side; counts: number of tokens that each slot brings.

        Rows with the same home and kind of work stand together, so that they move together.
        """
        slots = self._slots[batch]

        def order(slot: int) -> tuple[int, bool, int]:
            is_known = slots[slot].cached < slots[slot].num_known
            tier = self.admission.tier(batch, slot) if self.admission is not None else 0
            return tier, is_known, slot

        rows: list[Row] = []
        token_ids: list[int] = []
        scored: list[ScoredRow] = []
        prefill_tokens = 0
        for slot in sorted(counts, key=order):
            sequence, count = slots[slot], counts[slot]
            start, stop = sequence.cached, sequence.cached + count
            is_last = stop == len(sequence.token_ids) and not sequence.is_prefix
            is_known, before = start < sequence.num_known, sequence.before
            row = Row(slot, start - before, count, len(token_ids), is_last, is_known, before)
            rows.append(row)
            scored += filter(None, [sequence.scored(row)])
            token_ids += sequence.token_ids[start:stop]
            prefill_tokens += self._count(sequence, start, stop)
            sequence.cached = stop
        saved, self._saved_tokens = self._saved_tokens, 0
        return Rows(
            tuple(rows), tuple(token_ids), prefill_tokens, tuple(scored), saved_tokens=saved
        )

    def _count(self, sequence: Sequence, start: int, stop: int) -> int:
        """Prompt tokens among a sequence's tokens from start to stop, which a pass brings.

        Counts those that were computed before: as computed again if the row was set back, and as
        not saved if a prefix is computed again.
        """
        request = sequence.request
        again = max(min(self._cached_before.get(request.index, 0), stop) - start, 0)
        if sequence.is_prefix:
            self._saved_tokens -= again
            return stop - start
        self.recomputed_tokens += again
        return max(min(stop, len(request.prompt_token_ids)) - start - again, 0)


def _tokens_left(sequence: Sequence) -> int:
    return len(sequence.token_ids) - sequence.cached


def _index_of(prefix: Prefix) -> int:
    """Index of the request that stands for a prefix; those of others are 0 or more."""
    return -1 - prefix.number


def _sequence_of(prefix: Prefix) -> Sequence:
    """Sequence that brings a prefix's tokens, and is never sampled."""
    tokens = list(prefix.token_ids)
    request = Request(_index_of(prefix), tokens, SamplingParams(max_tokens=1))
    return Sequence(request, tokens, [], len(tokens), prefix=prefix.parent, is_prefix=True)
