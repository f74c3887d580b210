"""
Slots: exact keys and values of single tokens, which a layer keeps, with or without the matrix of a memory.

A layer gives each token a score. Where a segment ends, its tokens compete with those in the slots, and the m of the
greatest stay; what counts is the mean score of a token and its neighbours. Later tokens see them in the softmax of
local attention, each one from when it has left the window, so that nothing is seen twice. Slots are ordered by age,
and stand behind the window in that order: the latest at -N - 1, relative to the segment's first token.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import avg_pool1d

from .streams import DecodeLayout, SegmentLayout, take


# How far away, in tokens, the neighbours are whose scores count as a token's own. A statement is of use as a whole,
# and the few tokens that give it away may stand at its one end.
RADIUS = 5


class MemorySlots(NamedTuple):
    """
    What stands in m slots, the oldest first.

    Attributes:
        keys, values: `(rows, m, kv_heads, head_dim)`, keys without RoPE.
        scores: `(rows, m)`, by [`scores_of_passages`].
        places: `(rows, m)`, int64: the token's place in its stream, counted from 1; 0: an empty slot.
    """

    keys: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor
    places: torch.Tensor

    def map(self, function) -> "MemorySlots":
        return MemorySlots(*map(function, self))

    def take(self, index: torch.Tensor) -> "MemorySlots":
        """Those of `index` `(rows, K)`."""
        return self.map(lambda states: take(states, index))


def rounded(scores: torch.Tensor) -> torch.Tensor:
    """
    Scores rounded to bfloat16, so that tokens of equal states have the same, however a text is cut into calls. On the
    bits: a compiler takes a cast to bfloat16 and back for nothing.
    """
    bits = scores.detach().float().view(torch.int32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return bits.view(torch.float32).to(scores.dtype)


def scores_of_passages(scores: torch.Tensor) -> torch.Tensor:
    """
    By which the tokens of a segment compete: the mean of the scores `(rows, length)` of those at most `RADIUS` away.
    Tokens of other segments do not count, so that nothing of them must be kept for it.
    """
    return avg_pool1d(scores, 2 * RADIUS + 1, stride=1, padding=RADIUS, count_include_pad=False)


def kept(scores: torch.Tensor, places: torch.Tensor, count: int) -> torch.Tensor:
    """
    Which `count` of the candidates `(rows, C)`, the oldest first, stay: those of the greatest score, and of equal
    scores the later. Their indices `(rows, count)`, in the order of age; empty ones stay where there are no others.
    """
    ranked = scores.masked_fill(places == 0, -torch.inf).flip(1).argsort(dim=1, descending=True, stable=True)
    return (scores.shape[1] - 1 - ranked[:, :count]).sort(1).values


def tokens_of_segments(layout: DecodeLayout | SegmentLayout, length: int) -> torch.Tensor:
    """The places of the first `length` tokens of each segment, `(G or 1, length)`; 0 for sinks, which always stay."""
    offsets = torch.arange(1, length + 1, device=layout.segment_index.device)
    places = (layout.segment_index * layout.config.segment_length).unsqueeze(1) + offsets
    return places.masked_fill(places <= layout.config.num_sink_tokens, 0)


def scan_slots(before: MemorySlots, segments: MemorySlots, complete: torch.Tensor | None) -> MemorySlots:
    """
    The slots before, between and after S segments, `(R, S + 1, m, ...)`.

    Args:
        before: of each stream, `(R, m, ...)`.
        segments: the tokens of each segment, `(R, S, length, ...)`.
        complete: `(R or 1, S)` bool, the segments that have ended; `None`: all.
    """
    count, (_, num_segments, length) = before.scores.shape[1], segments.scores.shape
    candidates = MemorySlots(*(torch.cat([old, new.flatten(1, 2)], 1) for old, new in zip(before, segments)))
    scores, places = candidates.scores.detach(), candidates.places
    own = torch.arange(count, count + length, device=places.device).expand(places.shape[0], -1)
    index = [torch.arange(count, device=places.device).expand(places.shape[0], -1)]
    for segment in range(num_segments):
        competing = torch.cat([index[-1], own + segment * length], 1)
        found = competing.gather(1, kept(scores.gather(1, competing), places.gather(1, competing), count))
        index.append(found if complete is None else found.where(complete[:, segment, None], index[-1]))
    return candidates.take(torch.cat(index, 1)).map(lambda states: states.unflatten(1, (-1, count)))


def relative_places(places: torch.Tensor, layout: DecodeLayout | SegmentLayout) -> torch.Tensor:
    """Where the tokens of slots `(G, m)` stand, relative to each segment's first token; N: an empty slot."""
    segment_length = layout.config.segment_length
    relative = places - 1 - (layout.segment_index * segment_length).unsqueeze(1)
    return relative.masked_fill(places == 0, segment_length)
