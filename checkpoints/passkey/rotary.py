"""RoPE at positions relative to a segment's first token, so that no angle grows with the length of a stream."""

from typing import NamedTuple

import torch

from .configuration_infini import InfiniConfig


# cos, and sin with the signs of rotate_half: negative in the first half of the head
Angles = tuple[torch.Tensor, ...]


class RotaryAngles(NamedTuple):
    """
    cos and sin of RoPE, each `(B or 1, T, head_dim)`, at positions relative to a segment's first token.

    Attributes:
        own: of the call's tokens in their own segment.
        next: of the call's tokens as seen from the next segment, a segment length further back; `None` in `"segment"`.
        sinks: of the sinks, `(1, num_sink_tokens, head_dim)`; in a decode step `(B, 1, head_dim)`, of the token as a
            sink; `None` without sinks.
    """

    own: Angles
    next: Angles | None = None
    sinks: Angles | None = None

    def to(self, *args, **kwargs) -> "RotaryAngles":
        return RotaryAngles(*(pair and tuple(table.to(*args, **kwargs) for table in pair) for pair in self))


def rotate(states: torch.Tensor, angles: Angles) -> torch.Tensor:
    """RoPE of `states` `(B, T, heads, head_dim)`, in their dtype (under autocast, the angles' is another)."""
    cos, sin = angles
    # Bit for bit Llama's, with a roll for its rotate_half, whose two slices autograd would pad with zeros and add up.
    swapped = states.roll(states.shape[-1] // 2, -1)
    return (states * cos.unsqueeze(2) + swapped * sin.unsqueeze(2)).to(states.dtype)


def angle_table(cos: torch.Tensor, sin: torch.Tensor) -> Angles:
    """The table for [`relative_angles`], from Llama's cos and sin at [`angle_positions`], each `(1, K, head_dim)`."""
    first, second = sin.squeeze(0).chunk(2, -1)
    return cos.squeeze(0), torch.cat([-first, second], -1)


def angle_positions(config: InfiniConfig, device: torch.device) -> torch.Tensor:
    """The relative positions of an angle table: from the first sink to the last offset of a segment, `(1, K)`."""
    first = -config.segment_length - config.num_sink_tokens if config.is_sliding else 0
    return torch.arange(first, config.segment_length, device=device).unsqueeze(0)


def relative_angles(
    table: Angles, offsets: torch.Tensor, config: InfiniConfig, position: torch.Tensor | None = None
) -> RotaryAngles:
    """
    Looks up the angles of a call.

    Args:
        table: see [`angle_table`], `(K, head_dim)`.
        offsets: `(B or 1, T)`, offset of each token in its segment.
        position: `(B,)`, position of each token in its stream, in a decode step.
    """
    if not config.is_sliding:
        return RotaryAngles(own=tuple(angles[offsets] for angles in table))
    sinks, length = config.num_sink_tokens, config.segment_length
    own, following = (tuple(angles[offsets + start] for angles in table) for start in (sinks + length, sinks))
    if sinks == 0:
        return RotaryAngles(own, following)
    if position is None:
        return RotaryAngles(own, following, tuple(angles[:sinks].unsqueeze(0) for angles in table))
    sink = position.clamp(max=sinks - 1).unsqueeze(1)
    return RotaryAngles(own, following, tuple(angles[sink] for angles in table))
