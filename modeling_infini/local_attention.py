"""
What a token sees locally: the angles of RoPE in its window, and the mask over it.

Angles are taken at places relative to the first token of the segment that reads: none grows with the length of a
stream. In `"sliding"`, keys are kept without RoPE, and the slots of a window are rotated where they are read. In
`"segment"`, a token is seen at one place alone, and its key is kept as it is seen there.
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils.generic import is_flash_attention_requested

from .configuration_infini import InfiniConfig
from .gpu_kernels import fused_rotate, has_flash, has_kernels
from .streams import AlignedLayout, Layout


# cos, and sin with the signs of rotate_half: negative in the first half of the head; `(..., head_dim)` each.
Angles = tuple[torch.Tensor, torch.Tensor]

# From torch 2.12 on, query heads that share those of keys and values ask for it.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class RotaryAngles(NamedTuple):
    """
    cos and sin of the queries of a segment, `(G or 1, query_length, head_dim)` each; and of keys: in `"sliding"` of
    the slots of its window, `(G or 1, window, head_dim)`, in `"segment"` of the tokens of the call,
    `(B or 1, T, head_dim)`. And of windows with the slots of the memory before them, if there are any.
    """

    queries: Angles
    keys: Angles
    keys_with_slots: Angles | None = None


def rotate(states: torch.Tensor, angles: Angles) -> torch.Tensor:
    """RoPE of `states` `(G, slots, heads, head_dim)`, bit for bit Llama's, in their dtype (autocast has another)."""
    if has_kernels(states):
        return fused_rotate(states, *angles)
    cos, sin = (table.unsqueeze(2) for table in angles)
    half, dtype, states = states.shape[-1] // 2, states.dtype, states.to(cos.dtype)
    rotated = states * cos
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        # A roll for Llama's rotate_half, whose two slices autograd would pad with zeros and add up.
        return (rotated + states.roll(half, -1) * sin).to(dtype)
    # Each decode step rotates a window: fewer passes, and the strides of `states`, which attention wants.
    rotated[..., :half] += states[..., half:] * sin[..., :half]
    rotated[..., half:] += states[..., :half] * sin[..., half:]
    return rotated.to(dtype)


def angle_table(rotary_embedding: LlamaRotaryEmbedding, config: InfiniConfig, states: torch.Tensor) -> Angles:
    """
    The angles at all places relative to a segment's first token, `(K, head_dim)`: from the first sink to the last
    token of the segment. In the dtype and on the device of `states`.
    """
    first = config.segment_length - config.longest_distance
    positions = torch.arange(first, config.segment_length, device=states.device).unsqueeze(0)
    cos, sin = (table.squeeze(0) for table in rotary_embedding(states, positions))
    left, right = sin.chunk(2, -1)
    return cos, torch.cat([-left, right], -1)


def angles_of_call(table: Angles, layout: Layout) -> RotaryAngles:
    """The angles of a call, looked up in an [`angle_table`]."""
    origin = table[0].shape[0] - layout.config.segment_length
    keys = layout.window_positions if layout.config.is_sliding else layout.token_positions
    places = [layout.query_positions + origin, keys + origin]
    if layout.sees_past and (count := layout.config.num_memory_slots):
        slots = torch.arange(-count, 0, device=keys.device) - layout.config.segment_length
        places.append(torch.cat([slots.expand(keys.shape[0], -1), keys], 1) + origin)
    return RotaryAngles(*((table[0][place], table[1][place]) for place in places))


class FlashWindow(NamedTuple):
    """
    In place of a mask for `"sliding"`: PyTorch's flash attention over a window, which computes nothing that it hides.

    Attributes:
        segment_length: N; each query sees itself and the N - 1 tokens before it.
        segments: of each row.
        is_start: whether the first of them is that of its stream, with nothing before it.
    """

    segment_length: int
    segments: int
    is_start: bool

    @staticmethod
    def of(config: InfiniConfig, layout: Layout, states: torch.Tensor) -> "FlashWindow | None":
        """Of a call on a GPU without gradients, in half precision; `None` where a mask is needed."""
        is_window_alone = not (config.num_sink_tokens or config.num_memory_slots or config.attention_dropout)
        if not (isinstance(layout, AlignedLayout) and layout.sees_past and is_window_alone):
            return None
        if not has_flash(states, config.head_dim):
            return None
        return FlashWindow(config.segment_length, layout.segments, layout.start < config.segment_length)

    def attend(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
        """
        Args:
            queries: `(G, length, heads, head_dim)`.
            keys, values: of the windows, N slots of the segment before and then its own, which end with those of the
                queries, `(G, window, kv_heads, head_dim)`.

        Returns:
            As `queries`.
        """
        if not self.is_start:
            return self._attend(queries, keys, values, scaling)
        queries, keys, values = (states.unflatten(0, (-1, self.segments)) for states in (queries, keys, values))
        own_keys, own_values = (states[:, 0, self.segment_length :] for states in (keys, values))
        first = self._attend(queries[:, 0], own_keys, own_values, scaling)
        if self.segments == 1:
            return first
        queries, keys, values = (states[:, 1:].flatten(0, 1) for states in (queries, keys, values))
        others = self._attend(queries, keys, values, scaling)
        return torch.cat([first.unsqueeze(1), others.unflatten(0, (-1, self.segments - 1))], 1).flatten(0, 1)

    def _attend(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
        query_ends, key_ends = (
            torch.arange(0, (count + 1) * length, length, dtype=torch.int32, device=queries.device)
            for count, length in (queries.shape[:2], keys.shape[:2])
        )
        flash: Any = varlen_attn
        attended = flash(
            queries.flatten(0, 1),
            keys.flatten(0, 1),
            values.flatten(0, 1),
            query_ends,
            key_ends,
            queries.shape[1],
            keys.shape[1],
            scale=scaling,
            window_size=(self.segment_length - 1, 0),
            **GROUPED,
        )
        return attended.unflatten(0, queries.shape[:2])


def attend_by_one(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """
    sdpa of a single query of each head: those of the heads that share keys and values are queries of one head, so that
    nobody copies keys and values for each of them.

    Args:
        queries: `(G, 1, heads, head_dim)`.
        keys, values: `(G, window, kv_heads, head_dim)`.
        mask: `(G or 1, 1, 1, window)`.

    Returns:
        As `queries`.
    """
    grouped = queries.unflatten(2, (keys.shape[2], -1)).squeeze(1)
    attended = F.scaled_dot_product_attention(
        grouped, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask, scale=scaling
    )
    return attended.flatten(1, 2).unsqueeze(1)


def local_attention_mask(
    config: InfiniConfig, layout: Layout, states: torch.Tensor, slot_places: torch.Tensor | None = None
):
    """
    What the queries of each segment see of its window (sinks, segment before, own tokens), in the format of the
    attention backend: its own mask function makes it, as for any model. Or a [`FlashWindow`], where one is enough.

    Args:
        states: any tensor with the dtype and device of the attention.
        slot_places: `(G, m)`, where the tokens in the slots of a layer's memory stand, relative to the segment's first
            token; the slots then come before the window.
    """
    implementation, is_flash = config._attn_implementation, is_flash_attention_requested(config)
    if implementation == "sdpa" and (flash := FlashWindow.of(config, layout, states)) is not None:
        return flash
    sinks, segment_length = config.num_sink_tokens, config.segment_length
    if is_flash and (sinks or config.num_memory_slots):
        raise ValueError(
            f'attn_implementation="{implementation}" cannot express attention sinks (num_sink_tokens={sinks}) or '
            f'slots (num_memory_slots={config.num_memory_slots}). Use "sdpa" or "flex_attention".'
        )
    if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ValueError(
            f'attn_implementation="{implementation}" has no mask function: register one with '
            "transformers.AttentionMaskInterface.register, under the same name."
        )

    queries, window = layout.query_positions, layout.window_positions
    sees, padding_mask, batch_size, count = causal_mask_function, None, 1, 0
    if layout.sees_past:
        start = layout.segment_index * segment_length
        batch_size, is_by_row = start.shape[0], window.shape[0] > 1

        def sees(batch, head, query, slot):
            row, sink = batch if is_by_row else batch * 0, slot - count
            query, position = queries[row, query - layout.query_start], window[row, slot]
            in_window = (start[batch] + position >= 0) & (position <= query) & (query - position < segment_length)
            return torch.where(sink < sinks, start[batch] + query - sink >= segment_length, in_window)

        if slot_places is not None:
            (batch_size, count), sees_window, starts = slot_places.shape, sees, start.shape[0]
            # As long as both together: inductor (torch 2.13) cannot compile indices that are clamped.
            slot_places, window = F.pad(slot_places, (0, window.shape[1])), F.pad(window, (count, 0))

            def sees(batch, head, query, slot):
                row = batch if is_by_row else batch * 0
                distance = queries[row, query - layout.query_start] - slot_places[batch, slot]
                in_window = sees_window(batch if starts > 1 else batch * 0, head, query, slot)
                return torch.where(slot < count, distance >= segment_length, in_window)

        if is_flash:
            padding_mask = (start.unsqueeze(1) + window >= 0) & (window <= queries[:, -1:])

    return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
        batch_size=batch_size,
        q_length=queries.shape[1],
        kv_length=window.shape[1],
        q_offset=layout.query_start,
        kv_offset=0,
        mask_function=sees,
        attention_mask=padding_mask,
        allow_is_causal_skip=not layout.sees_past,
        dtype=states.dtype,
        device=states.device,
        config=config,
    )
