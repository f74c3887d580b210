"""
Streams: from the user's ids, masks and positions to where the tokens of a call stand in the segments of their streams.

A row of a batch reads a stream: its tokens (unmasked columns), one call after the other, until a document ends and a
new stream begins. Token number p of a stream stands in segment p // N at offset p mod N. A layout says, for one call,
which segments the call touches and where their tokens are, so that no layer sees padding, unequal rows or packed
documents. There are three:

- [`DecodeLayout`]: one token per row on top of a cache. Only tensor operations of fixed shape, for `torch.compile`.
- [`AlignedLayout`]: no padding, no restart, all rows at the same offset. Segments are views.
- [`RaggedLayout`]: everything else, by gathering.

What a layer keeps of the tokens stands in slots, `(B, num_sink_tokens + N, ...)`: the sinks, and a ring of the last N
tokens, with position p in slot num_sink_tokens + p mod N. `update` writes a call into the slots and returns the window
of each segment: what its queries may see, in the order sinks, segment before, own tokens; in a decode step, all slots.

Symbols in shapes: B rows and T columns of the call; R streams, each with at most S segments in this call; G segments
in all; N `segment_length`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers.utils import logging

from .configuration_infini import InfiniConfig


logger = logging.get_logger(__name__)

# Of packed sequences, for the attention backend: they describe columns, and the backend gets segments.
PACKING_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def taken_packing(kwargs: dict) -> dict[str, torch.Tensor]:
    """Takes out of `kwargs` those of `PACKING_ARGUMENTS` that it has."""
    packing = {name: kwargs.pop(name, None) for name in PACKING_ARGUMENTS}
    return {name: argument for name, argument in packing.items() if argument is not None}


def refuse_unless(condition: torch.Tensor, message: str) -> None:
    """Raises a ValueError if `condition` `()` is False; in an exported program, when it runs, a RuntimeError."""
    if torch.compiler.is_exporting():
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def last_tokens(attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """Which of the last `length` columns of a mask hold tokens, `(B, T)` bool."""
    return attention_mask[:, -length:] != 0


def columns_tokens_last(attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """The call's columns `(B, T)`, each row's padding first and then its tokens, both in their order."""
    return last_tokens(attention_mask, length).byte().argsort(dim=1, stable=True)


def streams_of_call(
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    shape: tuple[int, int],
    tokens_read: torch.Tensor | None,
    packing: dict[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """
    Which of a call's columns hold tokens, and which of these start a new stream inside of a row.

    Args:
        attention_mask: `(B, columns)`, 0 for padding and 1 for tokens, or the numbers 1, 2, ... of packed documents;
            of a longer history, the last columns belong to the call.
        position_ids: `(B or 1, columns)`, 0 where a document starts, and growing in it; ids of padding mean nothing.
        shape: `(B, T)` of the call.
        tokens_read: `(B,)`, tokens read before this call; `None`: nothing has been read.
        packing: of `PACKING_ARGUMENTS`, those that the call has.

    Returns:
        `is_token` `(B, T)` bool, `None`: all; and `restarts` `(B, T)` bool, `None`: none.

    Raises:
        ValueError: for shapes and values that have no meaning. Values are looked at but in a compiled call of one
            column; in an exported program, when it runs.
    """
    batch_size, length = shape
    is_token = restarts = None
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch_size:
            raise ValueError(
                f"attention_mask must be of shape (batch={batch_size}, columns), 0 for padding; got "
                f"{tuple(attention_mask.shape)}. What a token sees of its segment is given by the model."
            )
        is_token = _columns_of_call(attention_mask, "attention_mask", length, tokens_read) != 0
    if position_ids is not None:
        if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch_size):
            raise ValueError(
                f"position_ids must be of shape (batch={batch_size}, columns); got {tuple(position_ids.shape)}."
            )
        positions = _columns_of_call(position_ids, "position_ids", length, tokens_read).expand(batch_size, -1)
        if positions.is_floating_point():
            raise ValueError(f"position_ids must be whole numbers, got {positions.dtype}.")
        restarts = _restarts_of_positions(positions.long(), is_token, tokens_read)
    if is_token is not None and _numbers_documents(attention_mask, length):
        new_documents = _restarts_of_documents(
            attention_mask, length, tokens_read, is_start_known=position_ids is not None
        )
        restarts = new_documents if restarts is None else restarts | new_documents
    if packing:
        _check_packing(packing, is_token, restarts)
    return is_token, restarts


def _columns_of_call(states: torch.Tensor, name: str, length: int, tokens_read: torch.Tensor | None) -> torch.Tensor:
    columns = states.shape[1]
    if columns < length:
        raise ValueError(f"{name} has {columns} columns, but the inputs have {length}.")
    if columns > length and tokens_read is None:
        raise ValueError(f"{name} has {columns} columns, but the inputs have {length}, and nothing was read before.")
    return states[:, columns - length :]


def _restarts_of_positions(
    positions: torch.Tensor, is_token: torch.Tensor | None, tokens_read: torch.Tensor | None
) -> torch.Tensor:
    """A stream starts at a token whose id is 0, unless the row has read nothing yet; all arguments by column."""
    if is_token is None:
        is_token = torch.ones_like(positions, dtype=torch.bool)
    is_start = (positions == 0) & is_token
    has_read = torch.zeros_like(is_start[:, :1]) if tokens_read is None else (tokens_read > 0).unsqueeze(1)
    if positions.shape[1] == 1:
        return is_start & has_read
    columns = torch.arange(positions.shape[1], device=positions.device)
    token_before = F.pad(torch.where(is_token, columns, -1).cummax(1).values[:, :-1], (1, 0), value=-1)
    previous = torch.where(token_before >= 0, positions.gather(1, token_before.clamp(min=0)), -1)
    refuse_unless(
        ((positions == 0) | (positions > previous) | ~is_token).all(),
        "position_ids must grow from each token to the next, or start again at 0, where a new document begins. They "
        "serve only to find where documents start: leave them out if there is one document per row.",
    )
    return is_start & (has_read | (previous >= 0))


def _is_compiled_step(length: int) -> bool:
    """Whether the call is one of a graph that does not look at values."""
    return length == 1 and torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def _numbers_documents(attention_mask: torch.Tensor, length: int) -> bool:
    """Whether a mask has other values than 0 and 1. In a compiled step it may have, where it covers the history."""
    if attention_mask.dtype == torch.bool:
        return False
    if _is_compiled_step(length):
        return attention_mask.shape[1] > 1
    is_one = attention_mask == 1
    is_plain = (is_one | (attention_mask == 0)).all()
    if attention_mask.is_floating_point():
        # No token at all: an additive mask that hides none.
        is_plain = is_plain & is_one.any()
    if torch.compiler.is_exporting():
        refuse_unless(is_plain, "attention_mask must hold 0 and 1: exported programs take one document per row.")
        return False
    return not is_plain


def _newest_before(numbers: torch.Tensor) -> torch.Tensor:
    """Of growing numbers of documents `(B, columns)`, 0 for padding, that of the last token before each column."""
    return F.pad(numbers.cummax(1).values[:, :-1], (1, 0))


def _restarts_of_documents(
    attention_mask: torch.Tensor, length: int, tokens_read: torch.Tensor | None, is_start_known: bool
) -> torch.Tensor:
    """
    A stream starts at a token whose document has another number than that of the token before it.

    Args:
        is_start_known: whether something else tells if the call's first token goes on with a document.
    """
    number, previous = (numbers[:, -length:] for numbers in (attention_mask, _newest_before(attention_mask)))
    if not _is_compiled_step(length):
        refuse_unless(
            ((attention_mask >= 0) & (attention_mask == attention_mask.floor()) & attention_mask.isfinite()).all()
            & (attention_mask > 0).any(),
            "attention_mask must hold 0 for padding and 1 for tokens (or 1, 2, ... for packed documents). It has "
            "other values, or none but 0.0, as an additive mask (0 and -inf) would.",
        )
        refuse_unless(
            ((number == 0) | (number >= previous)).all(),
            "attention_mask numbers packed documents (its values are above 1), and their numbers must grow along "
            "each row: 1, 1, 2, 2, ...",
        )
        if tokens_read is not None and not is_start_known:
            first = number.gather(1, (number != 0).long().argmax(1, keepdim=True))
            refuse_unless(
                ((previous[:, :1] > 0) | (first == 0) | (tokens_read == 0).unsqueeze(1)).all(),
                "attention_mask numbers packed documents (its values are above 1), but it does not cover what the "
                "cache has read, so that nobody can tell whether the first token goes on with the last document. "
                "Pass the mask of the whole history, or position_ids that start at 0 in each document.",
            )
    return (number > previous) & (previous > 0)


def _check_packing(
    packing: dict[str, torch.Tensor], is_token: torch.Tensor | None, restarts: torch.Tensor | None
) -> None:
    """Where documents start by the arguments of an attention backend, a stream must start."""
    if restarts is None:
        raise ValueError(f"{', '.join(packing)}: packed sequences need position_ids that start at 0 in each document.")
    columns = torch.arange(restarts.numel(), device=restarts.device)
    for name in packing.keys() & {"cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"}:
        if name == "seq_idx":
            numbers = packing[name].expand_as(restarts) + 1
        else:
            starts = packing[name].flatten().long().sort().values
            numbers = torch.bucketize(columns, starts, right=True).view_as(restarts)
        if is_token is not None:
            numbers = numbers * is_token
        previous = _newest_before(numbers)
        starts_document = (numbers > previous) & (previous > 0)
        refuse_unless(
            (restarts | ~starts_document).all(),
            f"{name} and position_ids disagree: {name} starts a document where position_ids go on. What a token sees "
            "follows position_ids, which must be 0 at the start of each document.",
        )


def require_ids(input_ids: Any) -> None:
    """Raises TypeError or ValueError, which say what to do, for what is given instead of ids `(batch, length)`."""
    if not isinstance(input_ids, torch.Tensor):
        if isinstance(input_ids, Mapping):
            remedy = "Unpack what the tokenizer returns: model(**inputs), model.generate(**inputs)."
        else:
            remedy = 'The tokenizer makes them of a text: inputs = tokenizer(text, return_tensors="pt").'
        raise TypeError(f"input_ids must be a tensor (batch, length), got a {type(input_ids).__name__}. {remedy}")
    if input_ids.dim() != 2:
        raise ValueError(
            f"input_ids must be of the shape (batch, length), got {tuple(input_ids.shape)}. A single text is a batch "
            "of one: ids.unsqueeze(0)."
        )
    if input_ids.dtype not in (torch.long, torch.int):
        raise TypeError(f"input_ids must be of the dtype torch.long, got {input_ids.dtype}: ids.long() makes them so.")


def split_call(inputs: dict, lengths: Sequence[int], tokens_read: torch.Tensor | None) -> list[dict]:
    """
    Cuts the inputs of one call into those of several calls that read the same.

    Args:
        inputs: `input_ids` or `inputs_embeds`, what has a column for each of theirs, `(B, T, ...)`, and anything else,
            which goes into each call as it is.
        lengths: number of columns of each call; their sum is T.
        tokens_read: `(B,)`, tokens read before the call; `None`: nothing has been read.
    """
    inputs = {name: states for name, states in inputs.items() if states is not None}
    if len(lengths) == 1:
        return [inputs]
    shape = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"].shape[:2]
    packing = taken_packing(inputs)
    is_token, restarts = streams_of_call(
        inputs.get("attention_mask"), inputs.get("position_ids"), shape, tokens_read, packing
    )
    if is_token is not None:
        inputs["attention_mask"] = is_token
    if restarts is not None:
        # 0 where a stream starts and growing elsewhere, so that a call may start at any of them.
        columns = torch.arange(shape[1], device=restarts.device)
        inputs["position_ids"] = columns - torch.where(restarts, columns, -1).cummax(1).values
    by_column = {name: states for name, states in inputs.items() if has_columns(states, shape)}
    whole = {name: state for name, state in inputs.items() if name not in by_column}
    pieces = zip(*(states.split(list(lengths), 1) for states in by_column.values()))
    return [{**whole, **dict(zip(by_column, (states.contiguous() for states in piece)))} for piece in pieces]


def warn_of_lost_start(
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    length: int,
    tokens_read: torch.Tensor | None,
) -> None:
    """
    Warns of learning from rows that go on with a document whose start nobody has read: their position ids start above
    the number of columns before, which may be padding. Arguments as those of [`streams_of_call`].
    """
    if any(states is not None and states.dim() != 2 for states in (position_ids, attention_mask)):
        return  # Refused where it is read.
    position_ids = position_ids[:, -length:]
    is_token = torch.ones_like(position_ids, dtype=torch.bool)
    if attention_mask is not None:
        is_token = last_tokens(attention_mask, length)
    is_first = is_token & (is_token.cumsum(1) == 1)
    is_lost = is_first & (position_ids > torch.arange(length, device=is_first.device))
    if tokens_read is not None:
        is_lost = is_lost & (tokens_read == 0).unsqueeze(1)
    if is_lost.any():
        logger.warning_once(
            "Rows that are learned from start at position ids above 0, but nothing was read before: if they go on "
            "with documents, as DocumentStreams do, the starts of these are lost. Only InfiniTrainer carries the "
            "memory from step to step, and it must get the DocumentStreams as they are, not wrapped."
        )


def targets(labels: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """
    What each token predicts, `(B, T)`: the label of the next token of its row. -100 for padding, last tokens of rows,
    and those of documents that the mask numbers.
    """
    length = labels.shape[1]
    if attention_mask is None:
        return F.pad(labels[:, 1:], (0, 1), value=-100)
    numbers = attention_mask[:, -length:].long()
    columns = torch.arange(length, device=labels.device)
    column_after = torch.where(numbers != 0, columns, length).flip(1).cummin(1).values.flip(1)
    column_after = F.pad(column_after[:, 1:], (0, 1), value=length)
    label, number = (F.pad(of, (0, 1), value=-100).gather(1, column_after) for of in (labels, numbers))
    return torch.where((numbers != 0) & (numbers == number), label, -100)


def has_columns(states, shape: Sequence[int]) -> bool:
    """Whether `states` is a tensor `(B, T, ...)`, with `shape` `(B, T)`."""
    return isinstance(states, torch.Tensor) and states.shape[:2] == tuple(shape)


def take(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Columns `index` `(B or 1, K)` of `states` `(B, C, ...)`: `(B, K, ...)`."""
    if index.shape[0] == 1:
        return states.index_select(1, index[0])
    rows = torch.arange(states.shape[0], device=states.device).unsqueeze(1)
    return states[rows, index]


class Layout:
    """
    Where the tokens of a call stand in their streams.

    Attributes:
        is_token: `(B, T)` bool, False for padding; `None`: no padding.
        restarts: `(B, T)` bool, True where a token starts a new stream; `None`: nowhere.
        tokens_read: `(B,)`, tokens of each row's last stream after this call.
        segment_index: `(G or 1,)`, number of each segment in its stream.
        sees_past: whether windows hold more than a segment's own tokens.
        query_start: offset of the first query slot of a segment.
        token_positions: `(B or 1, T)`, where the tokens stand, relative to the first token of their segment.
        query_positions, window_positions: `(G or 1, slots)`, where the queries of a segment and the slots of its
            window stand, relative to the segment's first token. Sinks stand behind the slots of the memory.
    """

    config: InfiniConfig
    is_token: torch.Tensor | None
    restarts: torch.Tensor | None
    tokens_read: torch.Tensor
    segment_index: torch.Tensor
    sees_past: bool
    query_start: int = 0
    token_positions: torch.Tensor
    query_positions: torch.Tensor
    window_positions: torch.Tensor

    def update(self, states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Writes `(B, T, ...)` into the slots, in place, and returns the windows, `(G, window, ...)`."""
        raise NotImplementedError

    def to_segments(self, states: torch.Tensor) -> torch.Tensor:
        """`(B, T, ...)` to query slots `(G, query_length, ...)`; what is of no token is arbitrary but finite."""
        return states

    def to_columns(self, states: torch.Tensor) -> torch.Tensor:
        """Query slots `(G, query_length, ...)` to `(B, T, ...)`; 0 where there is padding."""
        return states

    def first_states(self, states: torch.Tensor) -> torch.Tensor:
        """State of the rows before this call, `(B, ...)`, to that of the streams: `(R, ...)`, zero for new streams."""
        return states

    def _behind_memory(self, window_positions: torch.Tensor) -> torch.Tensor:
        """With room for the slots of the memory between the sinks and the window."""
        is_sink = window_positions < -self.config.segment_length
        return window_positions - self.config.num_memory_slots * is_sink

    def to(self, *args, **kwargs):
        """A copy with its tensors moved, for models that are spread over several devices."""
        moved = object.__new__(type(self))
        for name, value in vars(self).items():
            setattr(moved, name, value.to(*args, **kwargs) if isinstance(value, torch.Tensor) else value)
        return moved


class DecodeLayout(Layout):
    """
    One token per row, on top of a cache: each row's open segment, with one query.

    Attributes:
        written: `(B, 1)` bool, the rows that have a token; `None`: all.
        ends_segment: `(B,)` bool, True where the token is the last of its segment.
        may_end_segments: whether any of them is; in a graph, where nobody may look, always.
    """

    sees_past = True

    def __init__(
        self,
        is_token: torch.Tensor | None,
        restarts: torch.Tensor | None,
        tokens_read: torch.Tensor,
        config: InfiniConfig,
    ):
        self.config, self.is_token, self.restarts = config, is_token, restarts
        self.written = is_token
        # A copy: counters advance in place, and gradient checkpointing runs layers again after that.
        position = tokens_read.clone() if restarts is None else tokens_read.masked_fill(restarts.squeeze(1), 0)
        length, sinks = config.segment_length, config.num_sink_tokens
        self.segment_index, offset = position // length, position % length
        self.ends_segment = offset == length - 1
        self.tokens_read = position + 1
        if is_token is not None:
            self.ends_segment = self.ends_segment & is_token.squeeze(1)
            self.tokens_read = position + is_token.squeeze(1).long()
        is_graph = torch.compiler.is_compiling()
        self.may_end_segments = config.num_memory_slots > 0 and (is_graph or bool(self.ends_segment.any()))

        self.token_positions = self.query_positions = offset.unsqueeze(1)
        slots = torch.arange(-sinks, length, device=position.device).expand(position.shape[0], -1)
        self.window_positions = slots
        if config.is_sliding:
            # Past the token's own slot, the ring still holds the segment before.
            is_before = (slots > self.query_positions) | (slots < 0)
            self.window_positions = self._behind_memory(torch.where(is_before, slots - length, slots))

        # A token goes into the ring, and into its sink's slot if it is one. The two are never the same slot: a write
        # has one gradient for each.
        self._rows = torch.arange(position.shape[0], device=position.device).unsqueeze(1)
        self._slots, self._is_written = sinks + self.query_positions, is_token
        if sinks:
            self._slots = torch.cat([position.clamp(max=sinks - 1).unsqueeze(1), self._slots], 1)
            is_sink = (position < sinks).unsqueeze(1)
            self._is_written = torch.cat([is_sink, torch.ones_like(is_sink)], 1)
            if is_token is not None:
                self._is_written = self._is_written & is_token

    def update(self, states, slots):
        states = states.expand(-1, self._slots.shape[1], *states.shape[2:])
        if self._is_written is not None:
            is_written = self._is_written.view(*self._is_written.shape, *(1,) * (states.dim() - 2))
            states = torch.where(is_written, states, slots[self._rows, self._slots])
        # On a CPU, scatter_ takes five times as long in bfloat16.
        slots.index_put_((self._rows, self._slots), states)
        return slots

    def to_columns(self, states):
        if self.is_token is None:
            return states
        return states.where(self.is_token.view(-1, *(1,) * (states.dim() - 1)), 0)

    def first_states(self, states):
        if self.restarts is None:
            return states
        return states.masked_fill(self.restarts.view(-1, *(1,) * (states.dim() - 1)), 0)


class SegmentLayout(Layout):
    """
    The segments that a call of any number of tokens touches; base of [`AlignedLayout`] and [`RaggedLayout`].

    Attributes:
        reads_past: whether any of the segments has one before it in its stream.
        query_length: number of query slots of a segment.
        written: `(G or 1, query_length)` bool, the slots that hold a token of this call; `None`: all.
        complete: `(R or 1, S)` bool, the segments that end in this call; `None`: all.
    """

    reads_past: bool
    query_length: int
    written: torch.Tensor | None
    complete: torch.Tensor | None

    def _place_windows(self, device: torch.device) -> None:
        self.sees_past = self.config.is_sliding and self.reads_past
        first = -self.config.segment_length - self.config.num_sink_tokens if self.sees_past else 0
        end = self.query_start + self.query_length
        self.window_positions = self._behind_memory(torch.arange(first, end, device=device).unsqueeze(0))
        self.query_positions = torch.arange(self.query_start, end, device=device).unsqueeze(0)

    def windows(self, states: torch.Tensor, slots: torch.Tensor | None) -> torch.Tensor:
        """As [`update`], but nothing is written; with `slots` from before the call, `None` if nothing was read."""
        raise NotImplementedError

    def by_stream(self, states: torch.Tensor) -> torch.Tensor:
        """`(G, ...)` to `(R, S, ...)`, zero where a stream has fewer segments."""
        raise NotImplementedError

    def by_segment(self, states: torch.Tensor) -> torch.Tensor:
        """`(R, S, ...)` to `(G, ...)`."""
        raise NotImplementedError

    def last_states(self, states: torch.Tensor) -> torch.Tensor:
        """State of the streams after this call, `(R, ...)`, to that of the rows: `(B, ...)`."""
        return states


class AlignedLayout(SegmentLayout):
    """No padding, no restart, and all rows have read `start` tokens: segments are views of the call's columns."""

    def __init__(
        self,
        shape: Sequence[int],
        start: int,
        config: InfiniConfig,
        device: torch.device,
        reads_past: bool = False,
    ):
        self.config, self.is_token, self.restarts = config, None, None
        batch_size, self.length = shape
        self.start, segment_length = start, config.segment_length
        self.offset, end = start % segment_length, start + self.length
        first = start // segment_length
        self.segments = (end - 1) // segment_length - first + 1

        # A segment alone has a query slot for each column; several have all their slots, the ends of them empty.
        is_single = self.segments == 1
        self.query_start = self.offset if is_single else 0
        self.query_length = self.length if is_single else segment_length
        self.empty_before = self.offset - self.query_start
        self.empty_after = 0 if is_single else self.segments * segment_length - self.offset - self.length
        self.reads_past = reads_past or first + self.segments > 1
        # From the third segment on, all look alike: one entry stands for them, and what is made from it broadcasts.
        is_uniform = is_single or (first >= 2 and not config.num_memory_slots)
        self.segment_index = torch.arange(first, first + (1 if is_uniform else self.segments), device=device)
        if not is_uniform:
            self.segment_index = self.segment_index.repeat(batch_size)

        self.written = self.complete = None
        if self.empty_before or self.empty_after:
            self.written = self.to_segments(torch.ones(batch_size, self.length, dtype=torch.bool, device=device))
        if end % segment_length:
            self.complete = torch.arange(self.segments, device=device).unsqueeze(0) < self.segments - 1

        self.tokens_read = torch.full((batch_size,), end, device=device)
        self.token_positions = (torch.arange(start, end, device=device) % segment_length).unsqueeze(0)
        newest = torch.arange(end - min(self.length, segment_length), end, device=device)
        self._newest_slots = config.num_sink_tokens + newest % segment_length
        self._place_windows(device)

    def _split(self, states: torch.Tensor, empty_before: int) -> torch.Tensor:
        """Columns `(B, T, ...)` to `(B, S, slots, ...)`."""
        if empty_before or self.empty_after:
            states = F.pad(states, (0, 0) * (states.dim() - 2) + (empty_before, self.empty_after))
        return states.unflatten(1, (self.segments, states.shape[1] // self.segments))

    def to_segments(self, states):
        return self._split(states, self.empty_before).flatten(0, 1)

    def to_columns(self, states):
        states = states.unflatten(0, (-1, self.segments)).flatten(1, 2)
        return states[:, self.empty_before : self.empty_before + self.length]

    def windows(self, states, slots):
        sinks, segments = self.config.num_sink_tokens, self.segments
        if self.sees_past and slots is None:
            slots = states.new_zeros(states.shape[0], sinks + self.config.segment_length, *states.shape[2:])
        own = states
        if self.offset:
            own = torch.cat([slots[:, sinks : sinks + self.offset], states], 1)
        own = self._split(own, 0)
        if not self.sees_past:
            return own.flatten(0, 1)
        before = slots[:, sinks:].unsqueeze(1)
        if segments > 1:
            before = torch.cat([before, own[:, :-1]], 1)
        first = min(self.start, sinks)
        parts = [slots[:, :first], states[:, : sinks - first], slots[:, first + self.length : sinks]]
        first_tokens = torch.cat(parts, 1)
        first_tokens = first_tokens.unsqueeze(1).expand(-1, segments, *first_tokens.shape[1:])
        return torch.cat([first_tokens, before, own], 2).flatten(0, 1)

    def update(self, states, slots):
        windows = self.windows(states, slots)
        slots.index_copy_(1, self._newest_slots, states[:, -self._newest_slots.shape[0] :])
        new_sinks = min(self.config.num_sink_tokens - self.start, self.length)
        if new_sinks > 0:
            slots[:, self.start : self.start + new_sinks] = states[:, :new_sinks]
        return windows

    def by_stream(self, states):
        return states.unflatten(0, (-1, self.segments))

    def by_segment(self, states):
        return states.flatten(0, 1)


class RaggedLayout(SegmentLayout):
    """
    Padding, rows at different offsets, or several streams in a row: slots are gathered by index.

    In an export, nothing depends on the data but indices: each row is one stream, of as many segments as T tokens may
    touch.
    """

    def __init__(
        self,
        is_token: torch.Tensor,
        restarts: torch.Tensor | None,
        tokens_read: torch.Tensor | None,
        config: InfiniConfig,
    ):
        self.config, self.is_token, self.restarts = config, is_token, restarts
        batch_size, length, device = *is_token.shape, is_token.device
        segment_length, sinks = config.segment_length, config.num_sink_tokens
        is_static = torch.compiler.is_exporting()
        if restarts is None:
            restarts = torch.zeros_like(is_token)
        # A row that has read nothing starts at offset 0, and T tokens touch fewer segments.
        most_tokens = length if tokens_read is None else length + segment_length - 1
        if tokens_read is None:
            tokens_read = torch.zeros(batch_size, dtype=torch.long, device=device)

        # Streams of the call, row by row: first the one that the row continues, then one for each restart.
        streams_of_row = restarts.sum(1) + 1
        self._last_stream = streams_of_row.cumsum(0) - 1
        first_stream = self._last_stream - streams_of_row + 1
        rows = torch.arange(batch_size, device=device)
        self._row_of_stream = rows if is_static else rows.repeat_interleave(streams_of_row)
        num_streams = self._row_of_stream.shape[0]
        stream = first_stream.unsqueeze(1) + restarts.cumsum(1)
        self._continues = torch.zeros(num_streams, dtype=torch.bool, device=device).index_fill(0, first_stream, True)
        tokens_of_stream = torch.zeros(num_streams, dtype=torch.long, device=device)
        tokens_of_stream = tokens_of_stream.index_add(0, stream.flatten(), is_token.long().flatten())
        stream_start = torch.where(self._continues, tokens_read[self._row_of_stream], 0)
        stream_end = stream_start + tokens_of_stream
        self.tokens_read = stream_end[self._last_stream]

        # Tokens are numbered through the call: number = position + shift, with one shift for each stream.
        number = is_token.flatten().cumsum(0).view(batch_size, length) - 1
        shift = tokens_of_stream.cumsum(0) - tokens_of_stream - stream_start
        position = torch.where(is_token, number - shift[stream], 0)
        offset = self.token_positions = position % segment_length

        # Each stream has room for the segments of the longest one, `(R, S)`.
        first_segment = stream_start // segment_length
        last_order = torch.where(tokens_of_stream > 0, (stream_end - 1) // segment_length - first_segment, 0)
        self._segments = (most_tokens - 1) // segment_length + 1 if is_static else int(last_order.max()) + 1
        order = torch.arange(self._segments, device=device)
        segment_of_stream = first_segment.unsqueeze(1) + order
        self.complete = (segment_of_stream + 1) * segment_length <= stream_end.unsqueeze(1)
        if is_static:
            is_used = torch.ones_like(self.complete)
            self._place_in_streams = torch.arange(num_streams * self._segments, device=device)
            self.reads_past = most_tokens > segment_length
            self.query_length = min(most_tokens, segment_length)
        else:
            is_used = (order <= last_order.unsqueeze(1)) & (tokens_of_stream > 0).unsqueeze(1)
            # A call of padding alone has a segment without tokens, since not every backend takes none.
            is_used[0, 0] = True
            self._place_in_streams = is_used.flatten().nonzero().squeeze(1)
            self.reads_past = bool((is_used & (segment_of_stream > 0)).any())
            self.query_length = int(offset.max()) + 1
        self._place_windows(device)
        self.segment_index = segment_of_stream.flatten()[self._place_in_streams]
        stream_of_segment = self._place_in_streams // self._segments

        # Query slots of the tokens, `(B, T)`; and the columns of the tokens by their numbers.
        place = torch.where(is_token, stream * self._segments + position // segment_length - first_segment[stream], 0)
        self._slot_of_token = (is_used.flatten().cumsum(0) - 1)[place] * self.query_length + offset
        column_of_number = (~is_token).flatten().byte().argsort(stable=True)

        def find(streams: torch.Tensor, positions: torch.Tensor, sinks: int) -> tuple[torch.Tensor, torch.Tensor]:
            """
            The columns of the first `sinks` tokens of `streams` `(K,)` and then of `positions` `(K, P)`, -1 for what
            is not of this call; and their places among slots and columns side by side, where the others are in slots.
            """
            first = torch.arange(sinks, device=device).expand(positions.shape[0], -1)
            slots = torch.cat([first, config.num_sink_tokens + positions % segment_length], 1)
            positions = torch.cat([first, positions], 1)
            row, start, end, shift_of = (
                of[streams].unsqueeze(1) for of in (self._row_of_stream, stream_start, stream_end, shift)
            )
            is_here = (positions >= start) & (positions < end)
            columns = torch.where(is_here, column_of_number[torch.where(is_here, positions + shift_of, 0)], -1)
            num_slots = config.num_sink_tokens + segment_length
            return columns, torch.where(is_here, (row + 1) * num_slots + columns, row * (num_slots + length) + slots)

        past = segment_length if self.sees_past else 0
        offsets = torch.arange(-past, self.query_length, device=device)
        window = (self.segment_index * segment_length).unsqueeze(1) + offsets
        columns, self._window_source = find(stream_of_segment, window, sinks if self.sees_past else 0)
        own = columns[:, -self.query_length :]
        self.written, self._query_source = own >= 0, own.clamp(min=0)
        last = self.tokens_read.unsqueeze(1) - 1
        ring = last - (last - torch.arange(segment_length, device=device)) % segment_length
        _, self._slot_source = find(self._last_stream, ring, sinks)

    @staticmethod
    def _gather(states: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return states.flatten(0, 1).index_select(0, source.flatten()).unflatten(0, source.shape)

    def to_segments(self, states):
        return self._gather(states, self._query_source)

    def to_columns(self, states):
        columns = self._gather(states, self._slot_of_token)
        return columns.where(self.is_token.view(*self.is_token.shape, *(1,) * (columns.dim() - 2)), 0)

    def windows(self, states, slots):
        if slots is None:
            num_slots = self.config.num_sink_tokens + self.config.segment_length
            slots = states.new_zeros(states.shape[0], num_slots, *states.shape[2:])
        return self._gather(torch.cat([slots, states], 1), self._window_source)

    def update(self, states, slots):
        states = torch.cat([slots, states], 1)
        slots.copy_(self._gather(states, self._slot_source))
        return self._gather(states, self._window_source)

    def by_stream(self, states):
        streams = states.new_zeros(self.complete.numel(), *states.shape[1:])
        return streams.index_copy(0, self._place_in_streams, states).unflatten(0, (-1, self._segments))

    def by_segment(self, states):
        return states.flatten(0, 1).index_select(0, self._place_in_streams)

    def first_states(self, states):
        continues = self._continues.view(-1, *(1,) * (states.dim() - 1))
        return states.index_select(0, self._row_of_stream).where(continues, 0)

    def last_states(self, states):
        return states.index_select(0, self._last_stream)


def plan_segments(
    is_token: torch.Tensor | None,
    restarts: torch.Tensor | None,
    shape: Sequence[int],
    tokens_read: torch.Tensor | None,
    config: InfiniConfig,
    device: torch.device,
) -> AlignedLayout | RaggedLayout:
    """
    The layout of a call of any number of tokens; arguments as [`streams_of_call`] takes and returns them. Looks at
    their values, and so waits for the device; not in an export, whose program takes one stream per row.
    """
    if is_token is None and restarts is None and tokens_read is None:
        return AlignedLayout(shape, 0, config, device)
    if torch.compiler.is_exporting():
        if restarts is not None:
            refuse_unless(
                ~restarts.any(), "position_ids must not start again: exported programs take one document per row."
            )
            restarts = None
    else:
        starts = [0] if tokens_read is None else tokens_read.tolist()
        has_streams = restarts is not None and bool(restarts.any())
        if min(starts) == max(starts) and not has_streams and (is_token is None or bool(is_token.all())):
            return AlignedLayout(shape, starts[0], config, device)
    if is_token is None:
        is_token = torch.ones(shape, dtype=torch.bool, device=device)
    return RaggedLayout(is_token, restarts, tokens_read, config)


def plan_call(
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    shape: tuple[int, int],
    tokens_read: torch.Tensor | None,
    config: InfiniConfig,
    device: torch.device,
    packing: dict[str, torch.Tensor],
) -> SegmentLayout:
    """The layout of a call of any number of tokens; arguments as those of [`streams_of_call`]."""
    is_token, restarts = streams_of_call(attention_mask, position_ids, shape, tokens_read, packing)
    return plan_segments(is_token, restarts, shape, tokens_read, config, device)
