"""
Streams: where the tokens of a call stand in the segments of their streams.

A row of a batch reads a stream: its unmasked tokens, one call after the other, until `position_ids` restart and a new
stream begins. Token number p of a stream stands in segment p // N at offset p mod N. A layout answers, for one call,
which segments the call touches and which column of the call (or of the cache) each of their slots holds, so that no
layer sees padding, unequal rows or packed documents. There are three:

- [`DecodeLayout`]: one token per row on top of a cache. Only tensor operations of fixed shape, for `torch.compile`.
- [`AlignedLayout`]: no padding, no restart, all rows at the same offset. Segments are views.
- [`RaggedLayout`]: everything else, by gathering.

Symbols in shapes: B rows and T columns of the call; R streams, each with at most S segments in this call; G segments
in all; N `segment_length`; the last N tokens of each row stand in the cache's ring, at slot p mod N.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F


def find_restarts(
    position_ids: torch.Tensor, tokens: torch.Tensor | None, tokens_read: torch.Tensor | None
) -> torch.Tensor:
    """
    Where a new stream starts inside a row: at a token whose position id is 0, unless the row has read nothing yet.

    Args:
        position_ids: `(B, T)`.
        tokens: `(B, T)` bool, False for padding, whose ids mean nothing; `None`: no padding.
        tokens_read: `(B,)`, tokens read before this call; `None`: nothing has been read.

    Returns:
        `(B, T)` bool.

    Raises:
        ValueError: at an id that is neither 0 nor greater than that of the token before it, where values can be
            looked at: not in a call of one column that is compiled, and when the program runs, if it is exported.
    """
    is_start = position_ids == 0
    if tokens is not None:
        is_start = is_start & tokens
    first = torch.zeros_like(is_start[:, :1]) if tokens_read is None else (tokens_read > 0).unsqueeze(1)
    if position_ids.shape[1] == 1:
        return is_start & first
    if tokens is None:
        previous, follows = F.pad(position_ids[:, :-1], (1, 0), value=-1), torch.ones_like(is_start)
        has_read = torch.cat([first, follows[:, 1:]], 1)
    else:
        columns = torch.arange(position_ids.shape[1], device=position_ids.device)
        last_token = F.pad(torch.where(tokens, columns, -1).cummax(1).values[:, :-1], (1, 0), value=-1)
        previous = torch.where(last_token >= 0, position_ids.gather(1, last_token.clamp(min=0)), -1)
        has_read = (last_token >= 0) | first
    is_meant = (position_ids == 0) | (position_ids > previous)
    refuse_unless(
        (is_meant if tokens is None else is_meant | ~tokens).all(),
        "position_ids must grow from each token to the next, or start again at 0, where a new document begins. They "
        "serve only to find where documents start: leave them out if there is one document per row.",
    )
    return is_start & has_read


def refuse_unless(condition: torch.Tensor, message: str) -> None:
    """Raises a ValueError if `condition` `()` is False; in an exported program, when it runs, a RuntimeError."""
    if torch.compiler.is_exporting():
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def canonical_position_ids(restarts: torch.Tensor) -> torch.Tensor:
    """Position ids `(B, T)` that are 0 where `restarts` `(B, T)` and increase elsewhere, also when cut into calls."""
    columns = torch.arange(restarts.shape[1], device=restarts.device)
    return columns - torch.where(restarts, columns, -1).cummax(1).values


def take(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Columns `index` `(B or 1, K)` of `states` `(B, C, ...)`: `(B, K, ...)`."""
    if index.shape[0] == 1:
        return states.index_select(1, index[0])
    rows = torch.arange(states.shape[0], device=states.device).unsqueeze(1)
    return states[rows, index]


class DecodeLayout:
    """
    One token per row, on top of a cache.

    Attributes:
        rows: `(B, 1)`, their numbers.
        offset, segment_index: `(B,)`, where the token stands in its stream.
        tokens: `(B,)` bool, False where the row has padding in this call; `None`: no padding.
        restarts: `(B,)` bool, True where the token starts a new stream; `None`: nowhere.
        tokens_read: `(B,)`, tokens of the stream after this call.
    """

    def __init__(
        self,
        tokens_read: torch.Tensor,
        tokens: torch.Tensor | None,
        restarts: torch.Tensor | None,
        segment_length: int,
    ):
        # A copy: counters advance in place, and gradient checkpointing runs layers again after that.
        position = tokens_read.clone() if restarts is None else tokens_read.masked_fill(restarts, 0)
        self.rows = torch.arange(position.shape[0], device=position.device).unsqueeze(1)
        self.position = position
        self.offset = position % segment_length
        self.segment_index = position // segment_length
        self.tokens = tokens
        self.restarts = restarts
        self.is_last_of_segment = self.offset == segment_length - 1
        if tokens is not None:
            self.is_last_of_segment = self.is_last_of_segment & tokens
        self.tokens_read = position + 1 if tokens is None else position + tokens.long()

    def slots_with_sink(self, num_sink_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The slots of a layer's cache that each row's token may be written to, its sink's and its ring's, `(B, 2)`; and
        whether it is, `(B, 2)` bool. The two slots differ, so that a scatter has one gradient for each.
        """
        sink_slot = self.position.clamp(max=max(num_sink_tokens - 1, 0))
        slots = torch.stack([sink_slot, num_sink_tokens + self.offset], 1)
        is_sink = self.position < num_sink_tokens
        written = torch.stack([is_sink, torch.ones_like(is_sink)], 1)
        return slots, written if self.tokens is None else written & self.tokens.unsqueeze(1)

    def to(self, *args, **kwargs) -> "DecodeLayout":
        return _move(self, *args, **kwargs)


class SegmentLayout:
    """
    The segments that a call of any number of tokens touches; base of [`AlignedLayout`] and [`RaggedLayout`].

    Attributes:
        offsets: `(B or 1, T)`, offset of each token in its segment.
        segment_index: `(G or 1,)`, number of each segment in its stream.
        reads_past: whether any of the segments has one before it in its stream.
        query_start: offset of the first query slot of a segment.
        query_length, key_length: number of query slots and key slots of a segment.
        written: `(G or 1, query_length)` bool, the slots that hold a token of this call; `None`: all.
        complete: `(R or 1, S)` bool, the segments that end in this call; `None`: all.
        ends_segment: whether any segment ends in this call; if none does, each stream has one segment at most.
        sink_is_new: `(R or 1, num_sink_tokens)` bool, the sinks that are in this call.
        tokens_read: `(B,)`, tokens of each row's last stream after this call.
    """

    segment_length: int
    batch_size: int
    offsets: torch.Tensor
    segment_index: torch.Tensor
    reads_past: bool
    query_start: int
    query_length: int
    key_length: int
    written: torch.Tensor | None
    complete: torch.Tensor | None
    ends_segment: bool
    sink_is_new: torch.Tensor
    tokens_read: torch.Tensor

    def to_segments(self, states: torch.Tensor) -> torch.Tensor:
        """`(B, T, ...)` to query slots `(G, query_length, ...)`; what `written` leaves out is arbitrary but finite."""
        raise NotImplementedError

    def to_columns(self, states: torch.Tensor) -> torch.Tensor:
        """Query slots `(G, query_length, ...)` to `(B, T, ...)`; 0 where there is padding."""
        raise NotImplementedError

    def own(self, states: torch.Tensor, ring: torch.Tensor | None) -> torch.Tensor:
        """Each segment's own tokens, from `(B, T, ...)` and the ring `(B, N, ...)`: `(G, key_length, ...)`."""
        raise NotImplementedError

    def previous(self, states: torch.Tensor, ring: torch.Tensor | None) -> torch.Tensor:
        """The tokens of the segment before each segment: `(G, N, ...)`; arbitrary where there is none."""
        raise NotImplementedError

    def write_ring(self, states: torch.Tensor, ring: torch.Tensor) -> None:
        """Writes the call's states `(B, T, ...)` into the ring `(B, N, ...)`, in place."""
        raise NotImplementedError

    def sinks(self, states: torch.Tensor) -> torch.Tensor:
        """Each stream's first tokens, as far as in this call (`sink_is_new`): `(R, num_sink_tokens, ...)`."""
        raise NotImplementedError

    def by_stream(self, states: torch.Tensor) -> torch.Tensor:
        """`(G, ...)` to `(R, S, ...)`, zero where a stream has fewer segments."""
        raise NotImplementedError

    def by_segment(self, states: torch.Tensor) -> torch.Tensor:
        """`(R, S, ...)` to `(G, ...)`."""
        raise NotImplementedError

    def of_segment(self, states: torch.Tensor) -> torch.Tensor:
        """What belongs to each segment's stream, `(R, ...)`: `(G, ...)`."""
        raise NotImplementedError

    def first_states(self, states: torch.Tensor) -> torch.Tensor:
        """State of the rows before this call, `(B, ...)`, to that of the streams: `(R, ...)`, zero for new streams."""
        raise NotImplementedError

    def last_states(self, states: torch.Tensor) -> torch.Tensor:
        """State of the streams after this call, `(R, ...)`, to that of the rows: `(B, ...)`."""
        raise NotImplementedError

    def last_segments(self, states: torch.Tensor) -> torch.Tensor:
        """Each stream's last segment of `(R, S, ...)`: `(R, ...)`."""
        raise NotImplementedError

    def to(self, *args, **kwargs) -> "SegmentLayout":
        return _move(self, *args, **kwargs)


class AlignedLayout(SegmentLayout):
    """No padding, no restart, and all rows have read `start` tokens: segments are views of the call's columns."""

    def __init__(
        self,
        batch_size: int,
        length: int,
        start: int,
        segment_length: int,
        num_sink_tokens: int,
        device: torch.device,
    ):
        self.batch_size, self.length, self.start, self.segment_length = batch_size, length, start, segment_length
        self.offset, end = start % segment_length, start + length
        first = start // segment_length
        self.segments = (end - 1) // segment_length - first + 1
        self.padding = self.segments * segment_length - self.offset - length
        self.is_single = self.segments == 1

        self.query_start = self.offset if self.is_single else 0
        self.query_length = length if self.is_single else segment_length
        self.key_length = self.query_start + self.query_length
        self.reads_past = first + self.segments > 1
        self.offsets = (torch.arange(length, device=device) + self.offset).unsqueeze(0) % segment_length
        # From the third segment on, all look alike: one entry stands for them, and what is made from it broadcasts.
        is_uniform = first >= 2 or self.is_single
        self.segment_index = torch.arange(first, first + (1 if is_uniform else self.segments), device=device)
        if not is_uniform:
            self.segment_index = self.segment_index.repeat(batch_size)

        self.written = self.complete = None
        self.ends_segment = not (self.is_single and self.padding)
        if not self.is_single and (self.offset or self.padding):
            slots = torch.arange(self.segments * segment_length, device=device)
            written = (slots >= self.offset) & (slots < self.offset + length)
            self.written = written.view(self.segments, segment_length).repeat(batch_size, 1)
        if self.padding:
            self.complete = torch.arange(self.segments, device=device).unsqueeze(0) < self.segments - 1

        self.tokens_read = torch.full((batch_size,), end, device=device)

        self._newest_slots = torch.arange(end - min(length, segment_length), end, device=device) % segment_length
        self._sink_columns = (torch.arange(num_sink_tokens, device=device) - start).unsqueeze(0)
        self.sink_is_new = (self._sink_columns >= 0) & (self._sink_columns < length)

    def _split(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(1, (self.segments, self.segment_length)).flatten(0, 1)

    def to_segments(self, states):
        if self.is_single:
            return states
        if self.offset or self.padding:
            states = F.pad(states, (0, 0) * (states.dim() - 2) + (self.offset, self.padding))
        return self._split(states)

    def to_columns(self, states):
        if self.is_single:
            return states
        states = states.unflatten(0, (self.batch_size, self.segments)).flatten(1, 2)
        return states[:, self.offset : self.offset + self.length]

    def own(self, states, ring):
        if self.offset == 0:
            return self.to_segments(states)
        states = torch.cat([ring[:, : self.offset], states], 1)
        if self.is_single:
            return states
        return self._split(F.pad(states, (0, 0) * (states.dim() - 2) + (0, self.padding)))

    def previous(self, states, ring):
        if ring is None:
            ring = states.new_zeros(self.batch_size, self.segment_length, *states.shape[2:])
        if self.is_single:
            return ring
        own = self.own(states, ring).unflatten(0, (self.batch_size, self.segments))
        return torch.cat([ring.unsqueeze(1), own[:, :-1]], 1).flatten(0, 1)

    def write_ring(self, states, ring):
        ring.index_copy_(1, self._newest_slots, states[:, -self._newest_slots.shape[0] :])

    def sinks(self, states):
        return take(states, self._sink_columns.clamp(0, self.length - 1))

    def by_stream(self, states):
        return states.unflatten(0, (self.batch_size, self.segments))

    def by_segment(self, states):
        return states.flatten(0, 1)

    def of_segment(self, states):
        return states.unsqueeze(1).expand(-1, self.segments, *states.shape[1:]).flatten(0, 1)

    def first_states(self, states):
        return states

    def last_states(self, states):
        return states

    def last_segments(self, states):
        return states[:, -1]


class RaggedLayout(SegmentLayout):
    """
    Padding, rows at different offsets, or several streams in a row: slots are gathered by index.

    With `restarts` unknown, `None`, nothing depends on the data but indices, for `torch.export`: each row is one
    stream, of as many segments as T tokens may touch.
    """

    query_start = 0

    def __init__(
        self,
        tokens: torch.Tensor,
        restarts: torch.Tensor | None,
        tokens_read: torch.Tensor | None,
        segment_length: int,
        num_sink_tokens: int,
    ):
        self.batch_size, self.length = tokens.shape
        self.segment_length = segment_length
        batch_size, length, device = *tokens.shape, tokens.device
        rows = torch.arange(batch_size, device=device)
        columns = torch.arange(length, device=device)
        is_static = restarts is None
        # A row that has read nothing starts at offset 0, and T tokens touch fewer segments.
        most_tokens = length if tokens_read is None else length + segment_length - 1
        if tokens_read is None:
            tokens_read = torch.zeros_like(rows)

        # Streams of the call, row by row: first the one that the row continues, then one for each restart.
        if is_static:
            stream_in_row = torch.zeros_like(tokens, dtype=torch.long)
            first_stream = self._last_stream = self._row_of_stream = rows
        else:
            stream_in_row = restarts.cumsum(1)
            streams_of_row = stream_in_row[:, -1] + 1
            first_stream = streams_of_row.cumsum(0) - streams_of_row
            self._row_of_stream = rows.repeat_interleave(streams_of_row)
            self._last_stream = first_stream + streams_of_row - 1
        stream = first_stream.unsqueeze(1) + stream_in_row
        num_streams = self._num_streams = self._row_of_stream.shape[0]
        self._continues = torch.zeros_like(self._row_of_stream, dtype=torch.bool).index_fill(0, first_stream, True)

        # Position of each token in its stream.
        rank = tokens.cumsum(1) - 1
        first_rank = 0 if is_static else torch.where(restarts, rank, 0).cummax(1).values
        position = rank - first_rank + torch.where(stream_in_row == 0, tokens_read.unsqueeze(1), 0)
        position = torch.where(tokens, position, 0)
        self.offsets = position % segment_length
        stream_start = torch.where(self._continues, tokens_read[self._row_of_stream], 0)
        first_segment = stream_start // segment_length
        tokens_of_stream = torch.zeros(num_streams, dtype=torch.long, device=device)
        tokens_of_stream = tokens_of_stream.index_add(0, stream.flatten(), tokens.long().flatten())
        stream_end = stream_start + tokens_of_stream
        self.tokens_read = stream_end[self._last_stream]

        # Segments of the call, in the order of their first tokens.
        if is_static:
            self._segments = (most_tokens - 1) // segment_length + 1
            order = torch.arange(self._segments, device=device).repeat(num_streams)
            self._stream_of_segment = rows.repeat_interleave(self._segments)
            self.segment_index = first_segment[self._stream_of_segment] + order
            segment = (position // segment_length - first_segment[stream]) + stream * self._segments
            self.reads_past = most_tokens > segment_length
            self.query_length = self.key_length = min(most_tokens, segment_length)
        else:
            opens_segment = tokens & ((self.offsets == 0) | (rank == 0))
            segment = opens_segment.flatten().cumsum(0).view(batch_size, length) - 1
            opening = opens_segment.flatten().nonzero().squeeze(1)
            if opening.numel() == 0:
                # A call of padding alone: one segment without tokens stands in, since not every backend takes none.
                opening = opening.new_zeros(1)
            self._stream_of_segment = stream.flatten()[opening]
            self.segment_index = position.flatten()[opening] // segment_length
            order = (self.segment_index - first_segment[self._stream_of_segment]).clamp(min=0)
            self._segments = int(order.max()) + 1
            self.reads_past = bool((self.segment_index > 0).any())
            self.query_length = self.key_length = max(1, int(torch.where(tokens, self.offsets + 1, 0).max()))
        num_segments = self._stream_of_segment.shape[0]
        row_of_segment = self._row_of_stream[self._stream_of_segment]
        self._slot_in_streams = self._stream_of_segment * self._segments + order
        slots = torch.arange(self.query_length, device=device)

        # Column of the call in each slot, -1 for none. What is no token goes to a slot past the last.
        num_slots = num_segments * self.query_length
        slot_of_token = segment * self.query_length + self.offsets
        self._tokens = tokens
        self._slot_of_token = torch.where(tokens, slot_of_token, 0)
        column = torch.full((num_slots + 1,), -1, device=device)
        column = column.scatter(0, torch.where(tokens, slot_of_token, num_slots).flatten(), columns.repeat(batch_size))
        column = column[:-1].view(num_segments, self.query_length)
        self.written = column >= 0
        self._query_source = row_of_segment.unsqueeze(1) * length + column.clamp(min=0)

        # Keys come from the ring and the call, laid side by side: N + T columns per row.
        width = segment_length + length
        row_start = row_of_segment.unsqueeze(1) * width
        self._own_source = row_start + torch.where(self.written, segment_length + column, slots)
        self._previous_source = row_start + torch.arange(segment_length, device=device)
        if self.query_length == segment_length and self._segments > 1:
            follows = self._stream_of_segment[1:] == self._stream_of_segment[:-1]
            followed = torch.where(follows.unsqueeze(1), self._own_source[:-1], self._previous_source[1:])
            self._previous_source = torch.cat([self._previous_source[:1], followed])

        # Each stream's segments that end in this call: all its tokens up to there have been read.
        order_of_stream = torch.arange(self._segments, device=device)
        segment_of_stream = first_segment.unsqueeze(1) + order_of_stream
        self.complete = (segment_of_stream + 1) * segment_length <= stream_end.unsqueeze(1)
        self.ends_segment = is_static or bool(self.complete.any())
        last = (stream_end - 1).clamp(min=0) // segment_length - first_segment
        self._last_order = torch.where(tokens_of_stream > 0, last, 0)

        # The call's columns by row and rank, to find a token of a stream by its position.
        column_of_rank = torch.zeros(batch_size, length + 1, dtype=torch.long, device=device)
        column_of_rank = column_of_rank.scatter(1, torch.where(tokens, rank, length), columns.expand_as(tokens))
        rank_of_start = torch.zeros(num_streams, dtype=torch.long, device=device)
        if not is_static:
            rank_of_start[stream[restarts]] = rank[restarts]
        self._column_of_rank, self._rank_of_start, self._stream_start = column_of_rank, rank_of_start, stream_start

        ring_slots = torch.arange(segment_length, device=device)
        last_position = self.tokens_read.unsqueeze(1) - 1
        newest = last_position - (last_position - ring_slots) % segment_length
        is_new = newest >= stream_start[self._last_stream].unsqueeze(1)
        source = segment_length + self._columns_of(self._last_stream, newest)
        self._ring_source = torch.where(is_new, source, ring_slots)

        sinks = torch.arange(num_sink_tokens, device=device).expand(num_streams, -1)
        self.sink_is_new = (sinks >= stream_start.unsqueeze(1)) & (sinks < stream_end.unsqueeze(1))
        self._sink_columns = self._columns_of(torch.arange(num_streams, device=device), sinks)

    def _columns_of(self, streams: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Columns `(K, P)` of the tokens at `positions` `(K, P)` of `streams` `(K,)`; arbitrary if not in the call."""
        rank = positions - self._stream_start[streams].unsqueeze(1) + self._rank_of_start[streams].unsqueeze(1)
        return self._column_of_rank[self._row_of_stream[streams]].gather(1, rank.clamp(0, self.length - 1))

    @staticmethod
    def _gather(states: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return states.flatten(0, 1).index_select(0, source.flatten()).unflatten(0, source.shape)

    def _with_ring(self, states: torch.Tensor, ring: torch.Tensor | None) -> torch.Tensor:
        if ring is None:
            ring = states.new_zeros(self.batch_size, self.segment_length, *states.shape[2:])
        return torch.cat([ring, states], 1)

    def to_segments(self, states):
        return self._gather(states, self._query_source)

    def to_columns(self, states):
        columns = self._gather(states, self._slot_of_token)
        return columns.where(self._tokens.view(*self._tokens.shape, *(1,) * (columns.dim() - 2)), 0)

    def own(self, states, ring):
        return self._gather(self._with_ring(states, ring), self._own_source)

    def previous(self, states, ring):
        return self._gather(self._with_ring(states, ring), self._previous_source)

    def write_ring(self, states, ring):
        ring.copy_(take(self._with_ring(states, ring), self._ring_source))

    def sinks(self, states):
        return states[self._row_of_stream.unsqueeze(1), self._sink_columns]

    def by_stream(self, states):
        streams = states.new_zeros(self._num_streams * self._segments, *states.shape[1:])
        return streams.index_copy(0, self._slot_in_streams, states).unflatten(0, (-1, self._segments))

    def by_segment(self, states):
        return states.flatten(0, 1).index_select(0, self._slot_in_streams)

    def of_segment(self, states):
        return states.index_select(0, self._stream_of_segment)

    def first_states(self, states):
        continues = self._continues.view(-1, *(1,) * (states.dim() - 1))
        return states.index_select(0, self._row_of_stream).where(continues, 0)

    def last_states(self, states):
        return states.index_select(0, self._last_stream)

    def last_segments(self, states):
        return states[torch.arange(self._num_streams, device=states.device), self._last_order]


def plan_segments(
    shape: Sequence[int],
    tokens: torch.Tensor | None,
    restarts: torch.Tensor | None,
    tokens_read: torch.Tensor | None,
    segment_length: int,
    num_sink_tokens: int,
    device: torch.device,
) -> AlignedLayout | RaggedLayout:
    """
    The layout of a call of any number of tokens. Looks at the values of its arguments, and so waits for the device;
    not in an export, whose program takes one stream per row.

    Args:
        shape: `(B, T)` of the call.
        tokens: `(B, T)` bool, False for padding; `None`: no padding.
        restarts: `(B, T)` bool, see [`find_restarts`]; `None`: no restart.
        tokens_read: `(B,)`, tokens read before this call; `None`: nothing has been read.
    """
    if tokens is None and restarts is None and tokens_read is None:
        return AlignedLayout(shape[0], shape[1], 0, segment_length, num_sink_tokens, device)
    all_tokens = torch.ones(shape, dtype=torch.bool, device=device) if tokens is None else tokens
    if torch.compiler.is_exporting():
        if restarts is not None:
            refuse_unless(
                ~restarts.any(), "position_ids must not start again: exported programs take one document per row."
            )
        return RaggedLayout(all_tokens, None, tokens_read, segment_length, num_sink_tokens)
    starts = [0] if tokens_read is None else tokens_read.tolist()
    is_aligned = (
        min(starts) == max(starts)
        and (tokens is None or bool(tokens.all()))
        and (restarts is None or not bool(restarts.any()))
    )
    if is_aligned:
        return AlignedLayout(shape[0], shape[1], starts[0], segment_length, num_sink_tokens, device)
    if restarts is None:
        restarts = torch.zeros_like(all_tokens)
    return RaggedLayout(all_tokens, restarts, tokens_read, segment_length, num_sink_tokens)


def _move(layout, *args, **kwargs):
    """A copy of `layout` with its tensors moved, for models that are spread over several devices."""
    moved = object.__new__(type(layout))
    for name, value in vars(layout).items():
        setattr(moved, name, value.to(*args, **kwargs) if isinstance(value, torch.Tensor) else value)
    return moved
