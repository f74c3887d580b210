"""Masks: from the user's, over columns, and to the attention backend's, over the windows of segments."""

from collections.abc import Sequence

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.utils.generic import is_flash_attention_requested

from .configuration_infini import InfiniConfig
from .streams import DecodeLayout, SegmentLayout, canonical_position_ids, find_restarts


# Of packed sequences, for the attention backend: they describe columns, and the backend gets segments.
PACKING_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def tokens_of_call(attention_mask: torch.Tensor | None, batch_size: int, length: int) -> torch.Tensor | None:
    """The mask of the call's own columns, `(B, T)` bool, from one that may cover the whole history."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch_size:
        raise ValueError(
            f"attention_mask must be of shape (batch={batch_size}, columns), 0 for padding; got "
            f"{tuple(attention_mask.shape)}. What a token sees of its segment is given by the model."
        )
    return _columns_of_call(attention_mask, "attention_mask", length) != 0


def positions_of_call(position_ids: torch.Tensor, batch_size: int, length: int) -> torch.Tensor:
    """The position ids of the call's own columns, `(B, T)`."""
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch_size):
        raise ValueError(
            f"position_ids must be of shape (batch={batch_size}, columns); got {tuple(position_ids.shape)}."
        )
    return _columns_of_call(position_ids, "position_ids", length).expand(batch_size, -1)


def _columns_of_call(states: torch.Tensor, name: str, length: int) -> torch.Tensor:
    if states.shape[1] < length:
        raise ValueError(f"{name} has {states.shape[1]} columns, but the inputs have {length}.")
    return states[:, states.shape[1] - length :]


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
    tokens = tokens_of_call(inputs.get("attention_mask"), batch_size, length)
    if tokens is not None:
        inputs["attention_mask"] = tokens
    if "position_ids" in inputs:
        positions = positions_of_call(inputs["position_ids"], batch_size, length)
        inputs["position_ids"] = canonical_position_ids(find_restarts(positions, tokens, tokens_read))
    by_column = {name: states for name, states in inputs.items() if has_columns(states, batch_size, length)}
    whole = {name: state for name, state in inputs.items() if name not in (*by_column, *PACKING_ARGUMENTS)}
    pieces = zip(*(states.split(list(lengths), 1) for states in by_column.values()))
    return [{**whole, **dict(zip(by_column, (states.contiguous() for states in piece)))} for piece in pieces]


def has_columns(states, batch_size: int, length: int) -> bool:
    """Whether `states` is a tensor `(B, T, ...)`."""
    return isinstance(states, torch.Tensor) and states.shape[:2] == (batch_size, length)


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
