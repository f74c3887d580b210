"""What one decoder layer keeps of the streams (sinks, window, memory, open segment), and how a call changes it."""

import copy
from typing import NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin

from .configuration_infini import InfiniConfig
from .gpu_kernels import fused_write, has_kernels
from .memory import (
    FEATURE_MAPS,
    MemoryState,
    apply_correction,
    delta_correction,
    linear_write,
    memory_dtype,
    read_memory,
    scan,
    write_token,
)
from .memory_slots import MemorySlots, relative_places, scan_slots, scores_of_passages, tokens_of_segments
from .streams import DecodeLayout, SegmentLayout


class TokenStates(NamedTuple):
    """
    What a layer makes of the tokens of a call.

    Attributes:
        keys, values: `(B, T, kv_heads, head_dim)`, keys without RoPE in `"sliding"`, rotated in `"segment"`.
        memory_keys: as the feature map of the memory gets them, `(B, T, kv_heads, ...)`; `None`: as `keys`.
        write_strength: beta, `(B, T, kv_heads)`; `None` is 1.
        slot_scores: by which tokens are kept in slots, `(B, T, 1)`; `None`: there are no slots.
    """

    keys: torch.Tensor
    values: torch.Tensor
    memory_keys: torch.Tensor | None = None
    write_strength: torch.Tensor | None = None
    slot_scores: torch.Tensor | None = None

    def map(self, function) -> "TokenStates":
        return TokenStates(*(None if states is None else function(states) for states in self))

    @staticmethod
    def joined(calls: "list[TokenStates]") -> "TokenStates":
        """Calls one after the other, as one."""
        return TokenStates(*(None if states[0] is None else torch.cat(states, 1) for states in zip(*calls)))


class Window(NamedTuple):
    """
    What the queries of each segment see in their softmax.

    Attributes:
        keys, values: `(G, window, kv_heads, head_dim)`.
        slot_places: `(G, m)`, where the tokens of the first m of them stand, relative to the segment's first token:
            they are slots of the memory. `None`: there are none.
    """

    keys: torch.Tensor
    values: torch.Tensor
    slot_places: torch.Tensor | None = None

    def after(self, slots: MemorySlots, layout: DecodeLayout | SegmentLayout) -> "Window":
        """With slots `(G, m, ...)` before it."""
        # Side by side in the order of strides that attention wants.
        keys, values = (
            torch.cat([first.transpose(1, 2), second.transpose(1, 2)], 2).transpose(1, 2)
            for first, second in zip(slots[:2], self[:2])
        )
        return Window(keys, values, relative_places(slots.places, layout))

    def tokens(self, scores: torch.Tensor, layout: DecodeLayout | SegmentLayout) -> MemorySlots:
        """The own tokens of each segment `(G, length, ...)` as candidates for slots, by `scores` `(G, window, 1)`."""
        length = layout.config.segment_length
        # The ring of a decode step is whole where the segment ends, and not looked at elsewhere.
        if not isinstance(layout, DecodeLayout):
            length = layout.query_start + layout.query_length
        keys, values, scores = (states[:, -length:] for states in (*self[:2], scores[..., 0]))
        places = tokens_of_segments(layout, length).expand(keys.shape[0], -1)
        return MemorySlots(keys, values, scores_of_passages(scores), places)


def written_states(
    states: TokenStates, layout: DecodeLayout | SegmentLayout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """
    What the tokens of each segment write: their features `(G, kv_heads, query_length, key_dim)`, zero where there is
    no token; V `(G, kv_heads, query_length, head_dim)`; and beta `(G, kv_heads, query_length, 1)`, `None` is 1.
    """
    keys = states.keys if states.memory_keys is None else states.memory_keys
    dtype = memory_dtype(keys.dtype)
    # Contiguous: else each product of the features makes a copy that autograd keeps.
    feature_map = FEATURE_MAPS[layout.config.memory_feature_map]
    features = feature_map(layout.to_segments(keys).transpose(1, 2).to(dtype).contiguous())
    if layout.written is not None:
        features = features * layout.written[:, None, :, None]
    values, strength = layout.to_segments(states.values).transpose(1, 2).to(dtype), None
    if states.write_strength is not None:
        strength = layout.to_segments(states.write_strength.unsqueeze(-1)).transpose(1, 2).to(dtype)
    return features, values, strength


def added_by_kernel(states: TokenStates, layout: DecodeLayout | SegmentLayout) -> MemoryState | None:
    """What the linear rule adds for each segment, `(G, kv_heads, ...)`, by the kernel of a GPU; `None`: without it."""
    if layout.config.use_mem_delta_rule or not has_kernels(states.values):
        return None
    keys = states.keys if states.memory_keys is None else states.memory_keys
    values = states.values if states.write_strength is None else states.values * states.write_strength.unsqueeze(-1)
    is_exponential = layout.config.memory_feature_map == "exp"
    return fused_write(layout.to_segments(keys), layout.to_segments(values), layout.written, is_exponential)


class MemoryScan(NamedTuple):
    """
    What the segments of a call make of the memories of their streams.

    Attributes:
        memories: before, between and after the segments of each stream, `(R, S + 1, kv_heads, ...)`.
        added: what the linear rule adds for each segment, `(R, S, kv_heads, ...)`.
        corrections: what the delta rule takes, `(R, S, kv_heads, key_dim, key_dim)`; `None`: the linear rule.
    """

    memories: MemoryState
    added: MemoryState
    corrections: torch.Tensor | None

    def before(self, layout: SegmentLayout) -> MemoryState:
        """The memory before each segment, `(G, kv_heads, ...)`."""
        return MemoryState(*(layout.by_segment(states[:, :-1]) for states in self.memories))


class LayerPast:
    """
    What a layer goes on from in a call: here, nothing was read before, and the call is not kept. Others say what was
    read ([`InfiniCacheLayer`], and the other ranks of a sequence that is split over several).

    Attributes:
        has_memory: whether the layer writes and reads a memory, or sees its window alone.
    """

    def __init__(self, has_memory: bool):
        self.has_memory = has_memory

    def update(self, states: TokenStates, layout: SegmentLayout) -> tuple[Window, MemoryState | None]:
        """
        What each segment of a call sees: its local window, and the memory before it, `None` if the layer has none or
        all are the first ones of their streams.
        """
        window = Window(*map(layout.windows, states[:2], self.ring(states, layout)))
        if not layout.reads_past:
            return window, None
        memory = self.scan(states, layout).before(layout) if self.has_memory else None
        if states.slot_scores is not None:
            tokens = window.tokens(layout.windows(states.slot_scores, None), layout).map(layout.by_stream)
            nothing = tokens.map(lambda of: of.new_zeros(of.shape[0], layout.config.num_memory_slots, *of.shape[3:]))
            found = scan_slots(nothing, tokens, layout.complete)
            window = window.after(found.map(lambda of: layout.by_segment(of[:, :-1])), layout)
        return window, memory

    def ring(self, states: TokenStates, layout: SegmentLayout) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Keys and values of the slots before the call, `(B, num_sink_tokens + N, kv_heads, head_dim)`; or `None`."""
        return None, None

    def scan(self, states: TokenStates, layout: SegmentLayout, pending: MemoryState | None = None) -> MemoryScan:
        """
        Writes the segments of a call, all at once but for a scan over M and z.

        Args:
            pending: what earlier calls have left for the first segment of each stream to write, `(R, kv_heads, ...)`.
        """
        added = added_by_kernel(states, layout)
        if added is None:
            features, values, strength = written_states(states, layout)
            added = linear_write(features, values if strength is None else values * strength)
        added = MemoryState(*map(layout.by_stream, added))
        if pending is not None:
            with_pending = (
                torch.cat([new[:, :1] + old.unsqueeze(1), new[:, 1:]], 1) for new, old in zip(added, pending)
            )
            added = MemoryState(*with_pending)
        normalisers = scan(self.first_normaliser(added.normaliser, layout), added.normaliser)
        corrections = None
        if layout.config.use_mem_delta_rule:
            before = layout.by_segment(normalisers[:, :-1])
            corrections = layout.by_stream(delta_correction(features, before, layout.config.memory_eps, strength))
        matrices = scan(self.first_matrix(added.matrix, corrections, layout), added.matrix, corrections)
        return MemoryScan(MemoryState(matrices, normalisers), added, corrections)

    def first_normaliser(self, added: torch.Tensor, layout: SegmentLayout) -> torch.Tensor:
        """z of each stream before the call `(R, kv_heads, key_dim)`, to which the segments add `(R, S, ...)`."""
        return torch.zeros_like(added[:, 0])

    def first_matrix(
        self, added: torch.Tensor, corrections: torch.Tensor | None, layout: SegmentLayout
    ) -> torch.Tensor:
        """M of each stream before the call, `(R, kv_heads, key_dim, head_dim)`; the others as [`memory.scan`]'s."""
        return torch.zeros_like(added[:, 0])


class InfiniCacheLayer(LayerPast, CacheLayerMixin):
    """
    What one decoder layer remembers of each row's stream, of which n tokens have been read.

    Attributes:
        keys, values: `(batch, kv_heads, num_sink_tokens + N, head_dim)`: the sinks, and a ring of the last N tokens,
            with the token at position p in slot num_sink_tokens + p mod N. Keys are as in [`TokenStates`].
        memory, normaliser: M `(batch, kv_heads, key_dim, head_dim)` and z `(batch, kv_heads, key_dim)` over the
            complete segments; float32, or float64 in a float64 model. These and the next two: in a layer with memory.
        pending_memory, pending_normaliser: what the n mod N tokens of the open segment will add to them.
        slot_keys, slot_values: `(batch, kv_heads, m, head_dim)`; slot_scores, slot_places: `(batch, m)`; as in
            [`MemorySlots`]. In a layer with slots, as what follows.
        token_scores: `(batch, num_sink_tokens + N)`, the scores of the tokens of the ring.
        record: while recording, the last calls.
        is_shared_with_graph: whether the next call must leave the tensors as they are.
    """

    is_croppable = True

    WINDOW_STATES = ("keys", "values")
    MEMORY_STATES = ("memory", "normaliser", "pending_memory", "pending_normaliser")
    SLOT_STATES = ("slot_keys", "slot_values", "slot_scores", "slot_places", "token_scores")

    memory: torch.Tensor
    normaliser: torch.Tensor
    pending_memory: torch.Tensor
    pending_normaliser: torch.Tensor
    slot_keys: torch.Tensor
    slot_values: torch.Tensor
    slot_scores: torch.Tensor
    slot_places: torch.Tensor
    token_scores: torch.Tensor

    def __init__(self, config: InfiniConfig, layer_idx: int):
        CacheLayerMixin.__init__(self)
        LayerPast.__init__(self, layer_idx in config.layers_with_memory)
        self.config = config
        self.has_slots = layer_idx in config.layers_with_slots
        self.record: list[TokenStates] | None = None
        self.is_shared_with_graph = False

    @property
    def record_past(self) -> bool:
        return self.record is not None

    @record_past.setter
    def record_past(self, is_recording: bool) -> None:
        # So generate() ends the recording that it began, layer by layer.
        self.record = (self.record or []) if is_recording else None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Empty states for keys and values of `(batch, kv_heads, any, head_dim)`."""
        batch, heads, _, head_dim = key_states.shape
        slots = self.config.num_sink_tokens + self.config.segment_length
        dtype, key_dim = memory_dtype(key_states.dtype), self.config.memory_key_dim
        self.keys = key_states.new_zeros(batch, heads, slots, head_dim)
        self.values = value_states.new_zeros(batch, heads, slots, head_dim)
        if self.has_memory:
            self.memory = key_states.new_zeros(batch, heads, key_dim, head_dim, dtype=dtype)
            self.normaliser = key_states.new_zeros(batch, heads, key_dim, dtype=dtype)
            self.pending_memory = torch.zeros_like(self.memory)
            self.pending_normaliser = torch.zeros_like(self.normaliser)
        if self.has_slots:
            count = self.config.num_memory_slots
            self.slot_keys = key_states.new_zeros(batch, heads, count, head_dim)
            self.slot_values = value_states.new_zeros(batch, heads, count, head_dim)
            self.slot_scores = key_states.new_zeros(batch, count, dtype=dtype)
            self.slot_places = torch.zeros_like(self.slot_scores, dtype=torch.long)
            self.token_scores = key_states.new_zeros(batch, slots, dtype=dtype)
        self.device = key_states.device
        self.is_initialized = True

    @property
    def batch_size(self) -> int:
        return self.keys.shape[0] if self.is_initialized else -1

    def states(self) -> dict[str, torch.Tensor]:
        """The tensors of this layer by name."""
        names = (
            *self.WINDOW_STATES,
            *(self.MEMORY_STATES if self.has_memory else ()),
            *(self.SLOT_STATES if self.has_slots else ()),
        )
        return {name: getattr(self, name) for name in names} if self.is_initialized else {}

    def map_states(self, function) -> None:
        """Replaces each tensor, recorded ones included, by `function` of it; all have the batch as dimension 0."""
        for name, state in self.states().items():
            setattr(self, name, function(state))
        if self.record is not None:
            self.record = [call.map(function) for call in self.record]

    def write_into(self, states: dict[str, torch.Tensor]) -> None:
        """Puts what this layer holds into tensors of the same names, which it holds from now on."""
        for name, state in states.items():
            if (new := getattr(self, name)) is not state:
                setattr(self, name, state.copy_(new))

    def __deepcopy__(self, memo: dict) -> "InfiniCacheLayer":
        # Clones: states that carry a gradient cannot be deep-copied.
        layer = copy.copy(self)
        layer.map_states(torch.clone)
        return layer

    def fork(self) -> "InfiniCacheLayer":
        """An independent copy, without the record."""
        layer = copy.copy(self)
        layer.record = None
        return copy.deepcopy(layer)

    def leave_segment(self) -> None:
        """Where no row has an open segment, the window of `"segment"` is not seen again: zeros without memory do."""
        if not self.config.is_sliding:
            self.keys, self.values = (state.new_zeros(()).expand(state.shape) for state in (self.keys, self.values))
            # What takes no memory is not written in place.
            self.is_shared_with_graph = True

    def require_dtype(self, dtype: torch.dtype) -> None:
        if self.keys.dtype != dtype:
            raise ValueError(
                f"The cache holds {self.keys.dtype} keys, but the model computes in {dtype}. Load the model with the "
                "dtype that the cache was made with."
            )

    def update(  # type: ignore[override]
        self, states: TokenStates, layout: DecodeLayout | SegmentLayout
    ) -> tuple[Window, MemoryState | None]:
        """Reads a call of any number of tokens into the cache; returns what [`LayerPast.update`] does."""
        if not self.is_initialized:
            self.lazy_initialization(states.keys.transpose(1, 2), states.values.transpose(1, 2))
        self.require_dtype(states.keys.dtype)
        # What stands in the slots is overwritten in place, except where autograd may have saved it.
        if torch.is_grad_enabled() or self.is_shared_with_graph:
            self.keys, self.values = self.keys.clone(), self.values.clone()
            if self.has_slots:
                self.token_scores = self.token_scores.clone()
        self.is_shared_with_graph = torch.is_grad_enabled()
        if self.record is not None:
            self.record.append(states)
        window = Window(*map(layout.update, states[:2], (self.keys.transpose(1, 2), self.values.transpose(1, 2))))
        if self.has_slots:
            window = self._fill_slots(states, window, layout)
        if not self.has_memory:
            return window, None
        if isinstance(layout, DecodeLayout):
            return window, self._write_token(states, layout)
        return window, self._write_segments(states, layout)

    def _fill_slots(self, states: TokenStates, window: Window, layout: DecodeLayout | SegmentLayout) -> Window:
        """Lets the tokens of the segments that end compete for the slots; returns the windows with what they see."""
        keys, values = self.slot_keys.transpose(1, 2), self.slot_values.transpose(1, 2)
        before = MemorySlots(keys, values, self.slot_scores, self.slot_places).map(layout.first_states)
        scores = layout.update(states.slot_scores.detach(), self.token_scores.unsqueeze(-1))
        tokens = window.tokens(scores, layout)
        if isinstance(layout, DecodeLayout):
            seen = after = before
            if layout.may_end_segments:
                tokens = tokens.map(lambda of: of.unsqueeze(1))
                found = scan_slots(before, tokens, layout.ends_segment.unsqueeze(1))
                after = found.map(lambda of: of[:, -1])
        else:
            found = scan_slots(before, tokens.map(layout.by_stream), layout.complete)
            seen = found.map(lambda of: layout.by_segment(of[:, :-1]))
            after = found.map(lambda of: layout.last_states(of[:, -1]))
        if after.scores is not self.slot_scores:
            # Clones with strides of their own, for what is said in `_write_segments`.
            self.slot_keys, self.slot_values, self.slot_scores, self.slot_places = (
                states.clone(memory_format=torch.contiguous_format)
                for states in (after.keys.transpose(1, 2), after.values.transpose(1, 2), *after[2:])
            )
        return window.after(seen, layout) if layout.sees_past else window

    def first_normaliser(self, added, layout):
        return layout.first_states(self.normaliser)

    def first_matrix(self, added, corrections, layout):
        return layout.first_states(self.memory)

    def _write_segments(self, states: TokenStates, layout: SegmentLayout) -> MemoryState | None:
        pending = MemoryState(*map(layout.first_states, (self.pending_memory, self.pending_normaliser)))
        memories, added, corrections = found = self.scan(states, layout, pending)
        if layout.complete is None:
            # Clone: a slice would keep the states of all segments alive. With strides of its own: a compiled decode
            # step would be compiled anew for those of each number of segments.
            after = [states[:, -1].clone(memory_format=torch.contiguous_format) for states in memories]
            rest = [torch.zeros_like(states) for states in after]
        else:
            # What the open segment writes is kept apart: until it ends, its queries see the memory before it.
            streams = torch.arange(memories.matrix.shape[0], device=memories.matrix.device)
            count, segments = layout.complete.sum(1), layout.complete.shape[1]
            after = [states[streams, count] for states in memories]
            is_open, last = count < segments, count.clamp(max=segments - 1)
            rest = [states[streams, last] for states in added]
            if corrections is not None:
                rest[0] = rest[0] - apply_correction(corrections[streams, last], after[0])
            rest = [states * is_open.view(-1, *(1,) * (states.dim() - 1)) for states in rest]
        self.memory, self.normaliser = map(layout.last_states, after)
        self.pending_memory, self.pending_normaliser = map(layout.last_states, rest)
        return found.before(layout) if layout.reads_past else None

    def _write_token(self, states: TokenStates, layout: DecodeLayout) -> MemoryState:
        before = MemoryState(*map(layout.first_states, (self.memory, self.normaliser)))
        pending = MemoryState(*map(layout.first_states, (self.pending_memory, self.pending_normaliser)))
        if (added := added_by_kernel(states, layout)) is not None:
            pending = MemoryState(*(old + new for old, new in zip(pending, added)))
        else:
            features, values, strength = written_states(states, layout)
            if self.config.use_mem_delta_rule:
                values = values - read_memory(features, before, self.config.memory_eps)
            pending = write_token(features, values, pending, strength)
        # Where the segment ends, it is written. New states: those that the token reads stay as they are.
        written = [added * layout.ends_segment.view(-1, *(1,) * (added.dim() - 1)) for added in pending]
        self.memory, self.normaliser = (old + new for old, new in zip(before, written))
        self.pending_memory, self.pending_normaliser = (old - new for old, new in zip(pending, written))
        return before

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.config.num_sink_tokens + self.config.segment_length, 0

    def get_seq_length(self) -> int:
        raise NotImplementedError("The layers of an InfiniCache count nothing; use `cache.get_seq_length()`.")

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.record = None
        self.map_states(torch.zeros_like)

    def offload(self) -> None:
        raise NotImplementedError("An InfiniCache is of constant size and is not offloaded.")


LOSES_GRADIENTS = (
    "Reentrant gradient checkpointing loses the gradient of what is read into past_key_values. Set "
    '"use_reentrant": False in its options, or train without past_key_values (use_cache=False).'
)


class CheckpointedLayer:
    """
    The past of a layer that gradient checkpointing runs again in the backward pass: each run starts from the state
    `before` the call, and the last one's is `after`.
    """

    def __init__(self, before: InfiniCacheLayer):
        self.before = before
        self.after: InfiniCacheLayer | None = None

    def update(self, states: TokenStates, layout: DecodeLayout | SegmentLayout) -> tuple[Window, MemoryState | None]:
        # The call has gradients: without them here, a reentrant checkpoint runs the layer.
        if not torch.is_grad_enabled():
            raise ValueError(LOSES_GRADIENTS)
        self.after = copy.copy(self.before)
        # A record of its own: the call is recorded once, however often it runs.
        self.after.record = None if self.before.record is None else [*self.before.record]
        return self.after.update(states, layout)
