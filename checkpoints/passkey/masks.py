"""Masks: from the user's, over columns, and to the attention backend's, over the windows of segments."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.utils import logging
from transformers.utils.generic import is_flash_attention_requested

from .configuration_infini import InfiniConfig
from .streams import DecodeLayout, SegmentLayout, canonical_position_ids, find_restarts, plan_segments, refuse_unless


logger = logging.get_logger(__name__)

# Of packed sequences, for the attention backend: they describe columns, and the backend gets segments.
PACKING_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def taken_packing(kwargs: dict) -> dict[str, torch.Tensor]:
    """Takes out of `kwargs` those of `PACKING_ARGUMENTS` that it has."""
    packing = {name: kwargs.pop(name, None) for name in PACKING_ARGUMENTS}
    return {name: argument for name, argument in packing.items() if argument is not None}


def streams_of_call(
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    batch_size: int,
    length: int,
    tokens_read: torch.Tensor | None,
    packing: dict[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """
    Which of a call's columns hold tokens, and which of these start a new stream.

    Args:
        attention_mask: `(B, columns)`, 0 for padding and 1 for tokens, or the numbers 1, 2, ... of packed documents;
            of a longer history, the last columns belong to the call.
        position_ids: `(B or 1, columns)`, 0 where a document starts, see [`find_restarts`].
        tokens_read: `(B,)`, tokens read before this call; `None`: nothing has been read.
        packing: of `PACKING_ARGUMENTS`, those that the call has.

    Returns:
        `(B, T)` bool, `None`: all; and `(B, T)` bool, `None`: none.

    Raises:
        ValueError: for shapes and values that have no meaning.
    """
    tokens = restarts = None
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch_size:
            raise ValueError(
                f"attention_mask must be of shape (batch={batch_size}, columns), 0 for padding; got "
                f"{tuple(attention_mask.shape)}. What a token sees of its segment is given by the model."
            )
        tokens = _columns_of_call(attention_mask, "attention_mask", length, tokens_read) != 0
    if position_ids is not None:
        if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch_size):
            raise ValueError(
                f"position_ids must be of shape (batch={batch_size}, columns); got {tuple(position_ids.shape)}."
            )
        positions = _columns_of_call(position_ids, "position_ids", length, tokens_read).expand(batch_size, -1)
        if positions.is_floating_point():
            raise ValueError(f"position_ids must be whole numbers, got {positions.dtype}.")
        restarts = find_restarts(positions.long(), tokens, tokens_read)
    if tokens is not None and _numbers_documents(attention_mask, length):
        if not _is_compiled_step(length):
            _check_documents(attention_mask, length, None if restarts is not None else tokens_read)
        number, previous = _documents(attention_mask, length)
        new_documents = (number > previous) & (previous > 0)
        restarts = new_documents if restarts is None else restarts | new_documents
    if packing:
        _check_packing(packing, tokens, restarts, (batch_size, length))
    return tokens, restarts


def _check_packing(
    packing: dict[str, torch.Tensor],
    tokens: torch.Tensor | None,
    restarts: torch.Tensor | None,
    shape: tuple[int, int],
) -> None:
    """Where documents start by the arguments of an attention backend, a stream must start."""
    if restarts is None:
        raise ValueError(f"{', '.join(packing)}: packed sequences need position_ids that start at 0 in each document.")
    rows, length = shape
    for name in packing.keys() & {"cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"}:
        if name == "seq_idx":
            numbers = packing[name].expand(rows, -1) + 1
        else:
            starts = packing[name].flatten().long().clamp(max=rows * length)
            is_start = torch.zeros(rows * length + 1, dtype=torch.long, device=restarts.device)
            numbers = is_start.index_fill(0, starts, 1)[:-1].cumsum(0).view(rows, length)
        if tokens is not None:
            numbers = torch.where(tokens, numbers, 0)
        newest = numbers.cummax(1).values
        starts_document = F.pad((newest[:, 1:] > newest[:, :-1]) & (newest[:, :-1] > 0), (1, 0))
        refuse_unless(
            (restarts | ~starts_document).all(),
            f"{name} and position_ids disagree: {name} starts a document where position_ids go on. What a token sees "
            "follows position_ids, which must be 0 at the start of each document.",
        )


def plan_call(
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    shape: tuple[int, int],
    tokens_read: torch.Tensor | None,
    config: InfiniConfig,
    device: torch.device,
    packing: dict[str, torch.Tensor],
) -> tuple[torch.Tensor | None, torch.Tensor | None, SegmentLayout]:
    """
    What [`streams_of_call`] returns for a call of `shape` `(B, T)`, and its layout. What looks at values stands
    outside of compiled graphs, which it breaks once.
    """
    looks_at_values = attention_mask is not None or position_ids is not None or tokens_read is not None
    is_in_graph = torch.compiler.is_exporting() or not looks_at_values
    plan = _plan if is_in_graph else _plan_outside_of_graphs
    return plan(attention_mask, position_ids, shape, tokens_read, config, device, packing)


def _plan(attention_mask, position_ids, shape, tokens_read, config, device, packing):
    tokens, restarts = streams_of_call(attention_mask, position_ids, shape[0], shape[1], tokens_read, packing)
    layout = plan_segments(shape, tokens, restarts, tokens_read, config.segment_length, config.num_sink_tokens, device)
    return tokens, restarts, layout


_plan_outside_of_graphs = torch.compiler.disable(_plan)


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


def _documents(attention_mask: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of each column's document, and that of the token before it, 0 for none, `(B, T)`."""
    # Numbers grow, so that the greatest so far is that of the last token, and padding changes nothing.
    newest = F.pad(attention_mask.cummax(1).values, (1, 0))
    start = attention_mask.shape[1] - length
    return attention_mask[:, start:], newest[:, start:-1]


def _check_documents(attention_mask: torch.Tensor, length: int, tokens_read: torch.Tensor | None) -> None:
    """
    Refuses numbers that mean nothing, and those whose first token may go on with a document or not.

    Args:
        tokens_read: `(B,)`, tokens read before the call, where nothing else tells whether its first token goes on;
            `None`: something does.
    """
    refuse_unless(
        ((attention_mask >= 0) & (attention_mask == attention_mask.floor()) & attention_mask.isfinite()).all()
        & (attention_mask > 0).any(),
        "attention_mask must hold 0 for padding and 1 for tokens (or 1, 2, ... for packed documents). It has other "
        "values, or none but 0.0, as an additive mask (0 and -inf) would.",
    )
    number, previous = _documents(attention_mask, length)
    refuse_unless(
        ((number == 0) | (number >= previous)).all(),
        "attention_mask numbers packed documents (its values are above 1), and their numbers must grow along each "
        "row: 1, 1, 2, 2, ...",
    )
    if tokens_read is not None:
        first = number.gather(1, (number != 0).long().argmax(1, keepdim=True))
        refuse_unless(
            ((previous[:, :1] > 0) | (first <= 1) | (tokens_read == 0).unsqueeze(1)).all(),
            "attention_mask numbers packed documents (its values are above 1), but it does not cover what the cache "
            "has read, so that nobody can tell whether the first token goes on with the last document. Pass the mask "
            "of the whole history, or position_ids that start at 0 in each document.",
        )


def _columns_of_call(states: torch.Tensor, name: str, length: int, tokens_read: torch.Tensor | None) -> torch.Tensor:
    columns = states.shape[1]
    if columns < length:
        raise ValueError(f"{name} has {columns} columns, but the inputs have {length}.")
    if columns > length and tokens_read is None:
        raise ValueError(f"{name} has {columns} columns, but the inputs have {length}, and nothing was read before.")
    return states[:, columns - length :]


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
    tokens = torch.ones_like(position_ids) if attention_mask is None else last_tokens(attention_mask, length)
    column = tokens.byte().argmax(1, keepdim=True)
    start = position_ids.expand(len(tokens), -1).gather(1, column)
    is_lost = tokens.any(1, keepdim=True) & (start > column)
    if tokens_read is not None:
        is_lost = is_lost & (tokens_read == 0).unsqueeze(1)
    if is_lost.any():
        logger.warning_once(
            "Rows that are learned from start at position ids above 0, but nothing was read before: if they go on "
            "with documents, as DocumentStreams do, the starts of these are lost. Only InfiniTrainer carries the "
            "memory from step to step, and it must get the DocumentStreams as they are, not wrapped."
        )


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
    batch_size, length = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"].shape[:2]
    packing = taken_packing(inputs)
    tokens, restarts = streams_of_call(
        inputs.get("attention_mask"), inputs.get("position_ids"), batch_size, length, tokens_read, packing
    )
    if tokens is not None:
        inputs["attention_mask"] = tokens
    if restarts is not None:
        inputs["position_ids"] = canonical_position_ids(restarts)
    by_column = {name: states for name, states in inputs.items() if has_columns(states, batch_size, length)}
    whole = {name: state for name, state in inputs.items() if name not in by_column}
    pieces = zip(*(states.split(list(lengths), 1) for states in by_column.values()))
    return [{**whole, **dict(zip(by_column, (states.contiguous() for states in piece)))} for piece in pieces]


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


def labels_of(targets: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The labels `(B, T)` whose [`targets`] these are; -100 for each row's first token, which nothing predicts."""
    if attention_mask is None:
        return F.pad(targets[:, :-1], (1, 0), value=-100)
    columns = columns_tokens_last(attention_mask, targets.shape[1])
    of_tokens = F.pad(targets.gather(1, columns)[:, :-1], (1, 0), value=-100)
    return torch.full_like(targets, -100).scatter(1, columns, of_tokens)


def checked_targets(
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    shape: tuple[int, ...],
) -> torch.Tensor:
    """
    `shift_labels`, or else the [`targets`] of `labels`, for inputs of `shape` `(B, T)`; one of the two is given.

    Raises:
        ValueError: if a shape is another one, or if both are given and contradict each other.
    """
    for states in (labels, shift_labels):
        if states is not None and states.shape != shape:
            raise ValueError(f"labels are of shape {tuple(states.shape)}, but the inputs of {tuple(shape)}.")
    if labels is None:
        return shift_labels
    expected = targets(labels, attention_mask)
    if shift_labels is None:
        return expected
    # The label after the last column is known to shift_labels alone.
    if not torch.equal(expected[:, :-1], shift_labels[:, :-1]):
        raise ValueError(
            "labels and shift_labels contradict each other: shift_labels must be the labels, one column to the left, "
            "or further over padding, which predicts nothing. Leave one of them out."
        )
    return shift_labels


def has_columns(states, batch_size: int, length: int) -> bool:
    """Whether `states` is a tensor `(B, T, ...)`."""
    return isinstance(states, torch.Tensor) and states.shape[:2] == (batch_size, length)


def last_tokens(attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """Which of the last `length` columns of a mask hold tokens, `(B, T)` bool."""
    return attention_mask[:, -length:] != 0


def columns_tokens_last(attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """The call's columns `(B, T)`, each row's padding first and then its tokens, both in their order."""
    return last_tokens(attention_mask, length).byte().argsort(dim=1, stable=True)


def local_attention_mask(config: InfiniConfig, layout: SegmentLayout | DecodeLayout, states: torch.Tensor):
    """
    What the queries of each segment see of its window (sinks, segment before, own tokens), in the format of the
    attention backend: its own mask function makes it, as for any model.

    Args:
        states: any tensor with the dtype and device of the attention.
    """
    implementation = config._attn_implementation
    sinks, segment_length = config.num_sink_tokens, config.segment_length
    if is_flash_attention_requested(config) and sinks:
        raise ValueError(
            f'attn_implementation="{implementation}" cannot express attention sinks (num_sink_tokens={sinks}). Use '
            '"sdpa" or "flex_attention".'
        )
    if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ValueError(
            f'attn_implementation="{implementation}" has no mask function: register one with '
            "transformers.AttentionMaskInterface.register, under the same name."
        )

    query_offset, padding_mask, allow_skip = 0, None, False
    if isinstance(layout, DecodeLayout):
        visible = padding_mask = _visible_slots(config, layout)
        batch_size, query_length, window_length = visible.shape[0], 1, visible.shape[1]

        def sees(batch, head, query, slot):
            return visible[batch, slot]

    elif config.is_sliding and layout.reads_past:
        segment_index = layout.segment_index
        batch_size, query_length = segment_index.shape[0], layout.query_length
        window_length = sinks + segment_length + layout.key_length
        query_offset = layout.query_start
        if is_flash_attention_requested(config):
            slots = torch.arange(window_length, device=states.device)
            padding_mask = (segment_index > 0).unsqueeze(1) | (slots >= segment_length)

        def sees(batch, head, query, slot):
            query_position = segment_index[batch] * segment_length + query
            position = (segment_index[batch] - 1) * segment_length + slot - sinks
            in_window = (position >= 0) & (position <= query_position) & (query_position - position < segment_length)
            return torch.where(slot < sinks, query_position - slot >= segment_length, in_window)

    else:
        batch_size, query_length, window_length = 1, layout.query_length, layout.key_length
        query_offset, sees, allow_skip = layout.query_start, causal_mask_function, True

    return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
        batch_size=batch_size,
        q_length=query_length,
        kv_length=window_length,
        q_offset=query_offset,
        kv_offset=0,
        mask_function=sees,
        attention_mask=padding_mask,
        allow_is_causal_skip=allow_skip,
        dtype=states.dtype,
        device=states.device,
        config=config,
    )


def _visible_slots(config: InfiniConfig, layout: DecodeLayout) -> torch.Tensor:
    """The slots of the cache that each row's token sees, `(B, num_sink_tokens + N)` bool."""
    sinks, segment_length = config.num_sink_tokens, config.segment_length
    slots = torch.arange(-sinks, segment_length, device=layout.offset.device)
    visible = slots <= layout.offset.unsqueeze(1)
    if not config.is_sliding:
        return visible
    visible = visible | (layout.segment_index > 0).unsqueeze(1)
    left_the_window = layout.position.unsqueeze(1) - (slots + sinks) >= segment_length
    return torch.where(slots < 0, left_the_window, visible)
