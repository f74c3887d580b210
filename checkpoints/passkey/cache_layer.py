"""What one decoder layer keeps of the streams: compressive memory, open segment, window and sinks."""

import copy
from typing import NamedTuple, Protocol

import torch
from transformers.cache_utils import CacheLayerMixin

from .configuration_infini import InfiniConfig
from .memory import (
    affine_scan,
    apply_correction,
    delta_correction,
    exclusive_cumsum,
    feature_map,
    read_memory,
    segment_write,
)
from .rotary import RotaryAngles, rotate
from .streams import DecodeLayout, SegmentLayout, take


class KeyStates(NamedTuple):
    """
    The keys of a call, `(B, T, kv_heads, head_dim)`: without RoPE (`plain`), rotated as their own segment sees them
    (`own`), as the next one sees them (`next`), and the sinks `(R, num_sink_tokens, kv_heads, head_dim)` among them;
    and as the memory gets them (`memory`), `None` where that is without RoPE and no more.
    """

    plain: torch.Tensor
    own: torch.Tensor
    next: torch.Tensor | None
    sinks: torch.Tensor | None
    memory: torch.Tensor | None

    @property
    def of_memory(self) -> torch.Tensor:
        return self.plain if self.memory is None else self.memory

    @classmethod
    def rotated(
        cls,
        keys: torch.Tensor,
        angles: RotaryAngles,
        layout: SegmentLayout | DecodeLayout,
        memory: torch.Tensor | None,
    ) -> "KeyStates":
        next_keys = None if angles.next is None else rotate(keys, angles.next)
        sinks = None
        if angles.sinks is not None:
            sinks = rotate(layout.sinks(keys) if isinstance(layout, SegmentLayout) else keys, angles.sinks)
        return cls(keys, rotate(keys, angles.own), next_keys, sinks, memory)


class Window(NamedTuple):
    """What the queries of each segment see locally, `(G, window, kv_heads, head_dim)`: sinks, segment before, own."""

    keys: torch.Tensor
    values: torch.Tensor


class RecordedCall(NamedTuple):
    """
    What a call is read again from: keys without RoPE, values and keys as the memory gets them if that differs,
    `(batch, T, kv_heads, head_dim)`, and write strengths `(batch, T, kv_heads)` if the model learns them.
    """

    keys: torch.Tensor
    values: torch.Tensor
    memory_keys: torch.Tensor | None
    write_strength: torch.Tensor | None

    def map(self, function) -> "RecordedCall":
        return RecordedCall(*(None if states is None else function(states) for states in self))

    @staticmethod
    def joined(calls: "list[RecordedCall]") -> "RecordedCall":
        """Calls one after the other, as one."""
        return RecordedCall(*(None if states[0] is None else torch.cat(states, 1) for states in zip(*calls)))


class MemoryState(NamedTuple):
    """M `(..., kv_heads, head_dim, head_dim)` and z `(..., kv_heads, head_dim)`."""

    memory: torch.Tensor
    normaliser: torch.Tensor


class Past(Protocol):
    """What local attention needs of the tokens before a call: [`InfiniCacheLayer`] has it."""

    def rings(self) -> tuple[torch.Tensor | None, ...]: ...

    def sinks(self) -> Window: ...


def local_window(keys: KeyStates, values: torch.Tensor, layout: SegmentLayout, layer: Past | None) -> Window:
    """
    The local window of each segment of a call.

    Args:
        keys, values: of the call, `(B, T, kv_heads, head_dim)`.
        layer: the cache from before the call, or what stands for it; `None`: nothing has been read.
    """
    ring = (None, None, None) if layer is None else layer.rings()
    own = Window(layout.own(keys.own, ring[0]), layout.own(values, ring[2]))
    if keys.next is None or not layout.reads_past:
        return own
    previous = Window(layout.previous(keys.next, ring[1]), layout.previous(values, ring[2]))
    parts = [previous, own]
    if keys.sinks is not None:
        parts.insert(0, Window(*(layout.of_segment(sinks) for sinks in stream_sinks(keys, values, layout, layer))))
    return Window(*(torch.cat(states, 1) for states in zip(*parts)))


def stream_sinks(keys: KeyStates, values: torch.Tensor, layout: SegmentLayout, layer: Past | None) -> Window:
    """Keys and values of each stream's sinks, `(R, num_sink_tokens, kv_heads, head_dim)`, after a call."""
    new = Window(keys.sinks, layout.sinks(values))
    if layer is None:
        return new
    is_new = layout.sink_is_new[..., None, None]
    old = (layout.first_states(sinks) for sinks in layer.sinks())
    return Window(*(torch.where(is_new, *pair) for pair in zip(new, old)))


class MemoryScan(NamedTuple):
    """
    The memory before each segment of a call `(G, ...)`; after the call, and what the open segment adds, `(R, ...)`.
    """

    before: MemoryState
    after: MemoryState
    pending: MemoryState


def segment_writes(
    keys: torch.Tensor, values: torch.Tensor, layout: SegmentLayout, write_strength: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, MemoryState]:
    """
    sigma(K) and beta of the segments of a call, `(G, kv_heads, query_length, head_dim or 1)`, and what the linear rule
    adds for each to the memory of its stream, `(R, S, ...)`. Arguments as of [`scan_memory`].
    """
    dtype = memory_dtype(keys.dtype)
    # Contiguous, lest each product of the features makes a copy that autograd keeps.
    features = feature_map(layout.to_segments(keys).transpose(1, 2).to(dtype).contiguous())
    if layout.written is not None:
        features = features * layout.written[:, None, :, None]
    segment_values = layout.to_segments(values).transpose(1, 2).to(dtype)
    strength = None
    if write_strength is not None:
        strength = layout.to_segments(write_strength.unsqueeze(-1)).transpose(1, 2).to(dtype)
        segment_values = segment_values * strength
    return features, strength, MemoryState(*map(layout.by_stream, segment_write(features, segment_values)))


def keep(states: torch.Tensor, where: torch.Tensor | None) -> torch.Tensor:
    """`states` `(R, S, ...)` where `where` `(R or 1, S)`, zero elsewhere; `None`: everywhere."""
    return states if where is None else states * where.view(*where.shape, *(1,) * (states.dim() - where.dim()))


def scan_memory(
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: SegmentLayout,
    layer: "InfiniCacheLayer | None",
    config: InfiniConfig,
    write_strength: torch.Tensor | None = None,
) -> MemoryScan:
    """
    Writes the segments of a call, all at once but for a scan over M and z.

    Args:
        keys: as the memory gets them, `(B, T, kv_heads, head_dim)`.
        values: `(B, T, kv_heads, head_dim)`.
        layer: the cache from before the call; `None`: nothing has been read.
        write_strength: beta of each token, `(B, T, kv_heads)`; `None` is 1.
    """
    features, strength, writes = segment_writes(keys, values, layout, write_strength)
    if layer is None:
        start = MemoryState(*(torch.zeros_like(write[:, 0]) for write in writes))
    else:
        start = MemoryState(*map(layout.first_states, (layer.memory, layer.normaliser)))
        pending = MemoryState(*map(layout.first_states, (layer.pending_memory, layer.pending_normaliser)))
        if not layout.ends_segment:
            return _extend_pending(features, strength, writes, start, pending, layout, config)
        writes = MemoryState(*(torch.cat([(w[:, 0] + p).unsqueeze(1), w[:, 1:]], 1) for w, p in zip(writes, pending)))

    folded = MemoryState(*(keep(write, layout.complete) for write in writes))
    normalisers = exclusive_cumsum(start.normaliser, folded.normaliser)
    normaliser_before = layout.by_segment(normalisers[:, :-1])
    if config.use_mem_delta_rule:
        corrections = layout.by_stream(delta_correction(features, normaliser_before, config.memory_eps, strength))
        memories = affine_scan(start.memory, folded.memory, keep(corrections, layout.complete))
    else:
        memories = exclusive_cumsum(start.memory, folded.memory)
    before = MemoryState(layout.by_segment(memories[:, :-1]), normaliser_before)
    # Clones, lest a slice keeps the states of all segments alive; with strides of their own, lest a compiled decode
    # step is compiled anew for those of each number of segments.
    after = MemoryState(
        *(states[:, -1].clone(memory_format=torch.contiguous_format) for states in (memories, normalisers))
    )

    if layout.complete is None:
        return MemoryScan(before, after, MemoryState(*(torch.zeros_like(state) for state in after)))
    pending_memory, pending_normaliser = (layout.last_segments(write) for write in writes)
    if config.use_mem_delta_rule:
        last_memory = layout.last_segments(memories[:, :-1])
        pending_memory = pending_memory - apply_correction(layout.last_segments(corrections), last_memory)
    is_open = ~layout.last_segments(layout.complete.expand(pending_memory.shape[0], -1))
    return MemoryScan(before, after, MemoryState(keep(pending_memory, is_open), keep(pending_normaliser, is_open)))


def _extend_pending(
    features: torch.Tensor,
    strength: torch.Tensor | None,
    writes: MemoryState,
    start: MemoryState,
    pending: MemoryState,
    layout: SegmentLayout,
    config: InfiniConfig,
) -> MemoryScan:
    """A call in which no segment ends leaves the memory as it is; only what its open segments will add grows."""
    before = MemoryState(*map(layout.of_segment, start))
    added = writes.memory.squeeze(1)
    if config.use_mem_delta_rule:
        corrections = layout.by_stream(delta_correction(features, before.normaliser, config.memory_eps, strength))
        added = added - apply_correction(corrections.squeeze(1), start.memory)
    pending = MemoryState(pending.memory + added, pending.normaliser + writes.normaliser.squeeze(1))
    return MemoryScan(before, start, pending)


def memory_dtype(dtype: torch.dtype) -> torch.dtype:
    """M and z are float32 even where the model is not; float64 in a float64 model."""
    return torch.promote_types(dtype, torch.float32)


class InfiniCacheLayer(CacheLayerMixin):
    """
    What one decoder layer remembers of each row's stream, of which n tokens have been read.

    Attributes:
        keys: `(batch, kv_heads, num_sink_tokens + N, head_dim)`, rotated as the token's own segment sees them. The
            token at position p stands in slot num_sink_tokens + p mod N: a ring of the last N tokens.
        next_keys: the same keys as the next segment sees them, and in the first `num_sink_tokens` slots the sinks;
            `None` in `"segment"`.
        values: `(batch, kv_heads, num_sink_tokens + N, head_dim)`, in the slots of `next_keys`.
        memory, normaliser: M `(batch, kv_heads, head_dim, head_dim)` and z `(batch, kv_heads, head_dim)` over the
            complete segments; float32, or float64 in a float64 model.
        pending_memory, pending_normaliser: what the n mod N tokens of the open segment will add to them.
        record: while recording, the last calls.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    MEMORY_STATES = ("memory", "normaliser", "pending_memory", "pending_normaliser")
    RING_STATES = ("keys", "next_keys", "values")
    STATES = (*RING_STATES, *MEMORY_STATES)

    def __init__(self, config: InfiniConfig):
        super().__init__()
        self.config = config
        self.next_keys: torch.Tensor | None = None
        self.memory: torch.Tensor | None = None
        self.normaliser: torch.Tensor | None = None
        self.pending_memory: torch.Tensor | None = None
        self.pending_normaliser: torch.Tensor | None = None
        self.record: list[RecordedCall] | None = None
        self._is_shared_with_graph = False

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
        dtype = memory_dtype(key_states.dtype)
        self.keys = key_states.new_zeros(batch, heads, slots, head_dim)
        self.next_keys = torch.zeros_like(self.keys) if self.config.is_sliding else None
        self.values = value_states.new_zeros(batch, heads, slots, head_dim)
        self.memory = key_states.new_zeros(batch, heads, head_dim, head_dim, dtype=dtype)
        self.normaliser = key_states.new_zeros(batch, heads, head_dim, dtype=dtype)
        self.pending_memory = torch.zeros_like(self.memory)
        self.pending_normaliser = torch.zeros_like(self.normaliser)
        self.device = key_states.device
        self.is_initialized = True

    @property
    def batch_size(self) -> int:
        return self.keys.shape[0] if self.is_initialized else -1

    def states(self) -> dict[str, torch.Tensor]:
        """The tensors of this layer by name."""
        return {name: state for name in self.STATES if (state := getattr(self, name)) is not None}

    def map_states(self, function) -> None:
        """Replaces each tensor, recorded ones included, by `function` of it; all have the batch as dimension 0."""
        for name, state in self.states().items():
            setattr(self, name, function(state))
        if self.record is not None:
            self.record = [call.map(function) for call in self.record]

    def __deepcopy__(self, memo: dict) -> "InfiniCacheLayer":
        # Clones, since states that carry a gradient cannot be deep-copied.
        layer = copy.copy(self)
        layer.map_states(torch.clone)
        return layer

    def fork(self) -> "InfiniCacheLayer":
        """An independent copy, without the record."""
        layer = InfiniCacheLayer(self.config)
        for name, state in self.states().items():
            setattr(layer, name, state.clone())
        layer.is_initialized = self.is_initialized
        return layer

    def detached(self, is_between_segments: bool) -> "InfiniCacheLayer":
        """
        An independent copy that no gradient flows out of, without the record.

        Args:
            is_between_segments: no row has an open segment, so that keys (and in `"segment"` values) that only such a
                segment sees may be left out: they become zeros that take no memory.
        """
        layer = InfiniCacheLayer(self.config)
        unseen: tuple[str, ...] = ()
        if is_between_segments:
            unseen = ("keys",) if self.config.is_sliding else ("keys", "values")
        for name, state in self.states().items():
            copied = state.new_zeros(()).expand(state.shape) if name in unseen else state.detach().clone()
            setattr(layer, name, copied)
        layer.is_initialized = self.is_initialized
        layer._is_shared_with_graph = True
        return layer

    def _prepare_update(
        self, key_states: KeyStates, value_states: torch.Tensor, write_strength: torch.Tensor | None
    ) -> None:
        keys = key_states.plain
        if not self.is_initialized:
            self.lazy_initialization(keys.transpose(1, 2), value_states.transpose(1, 2))
        if self.keys.shape[0] != keys.shape[0]:
            raise ValueError(
                f"The cache holds {self.keys.shape[0]} rows, but the inputs have {keys.shape[0]}. To continue "
                "each row several times (beams, num_return_sequences), first call "
                "`cache.batch_repeat_interleave(n)`, on a copy.deepcopy of the cache if you need it again."
            )
        self.require_dtype(keys.dtype)
        # What stands in the ring is overwritten in place, except where autograd may have saved it.
        if torch.is_grad_enabled() or self._is_shared_with_graph:
            for name in self.RING_STATES:
                ring = getattr(self, name)
                setattr(self, name, None if ring is None else ring.clone())
        self._is_shared_with_graph = torch.is_grad_enabled()
        if self.record is not None:
            self.record.append(RecordedCall(keys, value_states, key_states.memory, write_strength))

    def require_dtype(self, dtype: torch.dtype) -> None:
        if self.keys.dtype != dtype:
            raise ValueError(
                f"The cache holds {self.keys.dtype} keys, but the model computes in {dtype}. Load the model with the "
                "dtype that the cache was made with."
            )

    def rings(self) -> tuple[torch.Tensor | None, ...]:
        """The last N tokens in `keys`, `next_keys` and `values`, `(batch, N, kv_heads, head_dim)`."""
        sinks = self.config.num_sink_tokens
        rings = (self.keys, self.next_keys, self.values)
        return tuple(None if ring is None else ring[:, :, sinks:].transpose(1, 2) for ring in rings)

    def sinks(self) -> Window:
        """Keys and values of the sinks, `(batch, num_sink_tokens, kv_heads, head_dim)`."""
        sinks = self.config.num_sink_tokens
        return Window(self.next_keys[:, :, :sinks].transpose(1, 2), self.values[:, :, :sinks].transpose(1, 2))

    def update(  # type: ignore[override]
        self,
        key_states: KeyStates,
        value_states: torch.Tensor,
        layout: SegmentLayout,
        write_strength: torch.Tensor | None = None,
    ) -> tuple[Window, MemoryState]:
        """
        Reads a call of any number of tokens into the cache.

        Args:
            key_states, value_states: `(B, T, kv_heads, head_dim)`.
            write_strength: beta of each token, `(B, T, kv_heads)`; `None` is 1.

        Returns:
            What each segment of the call sees: its local window, and the memory before it.
        """
        self._prepare_update(key_states, value_states, write_strength)
        window = local_window(key_states, value_states, layout, self)
        scan = scan_memory(key_states.of_memory, value_states, layout, self, self.config, write_strength)

        if key_states.sinks is not None:
            old_sinks = self.sinks()
            new_sinks = stream_sinks(key_states, value_states, layout, self)
            for old, new in zip(old_sinks, new_sinks):
                old.copy_(layout.last_states(new))
        for ring, states in zip(self.rings(), (key_states.own, key_states.next, value_states)):
            if ring is not None:
                layout.write_ring(states, ring)

        self.memory, self.normaliser = map(layout.last_states, scan.after)
        self.pending_memory, self.pending_normaliser = map(layout.last_states, scan.pending)
        return window, scan.before

    def decode_window(
        self,
        key_states: KeyStates,
        value_states: torch.Tensor,
        layout: DecodeLayout,
        write_strength: torch.Tensor | None,
    ) -> Window:
        """
        Reads one token per row into the ring (and the sinks), and starts a new stream where `layout` restarts.

        Args:
            key_states, value_states: `(B, 1, kv_heads, head_dim)`.
            write_strength: `(B, 1, kv_heads)`, for the record.

        Returns:
            All slots of the cache, `(batch, slots, kv_heads, head_dim)`, for a mask to choose from.
        """
        self._prepare_update(key_states, value_states, write_strength)
        if layout.restarts is not None:
            for name in self.MEMORY_STATES:
                state = getattr(self, name)
                setattr(self, name, state.masked_fill(layout.restarts.view(-1, *(1,) * (state.dim() - 1)), 0))

        sinks = self.config.num_sink_tokens
        slots = (sinks + layout.offset).unsqueeze(1)
        written = None if layout.tokens is None else layout.tokens.unsqueeze(1)
        _write_slots(self.keys, layout.rows, slots, key_states.own, written)
        next_keys = key_states.next
        if key_states.sinks is not None:
            slots, written = layout.slots_with_sink(sinks)
            next_keys = torch.cat([key_states.sinks, next_keys], 1)
            value_states = value_states.expand(-1, 2, -1, -1)
        _write_slots(self.values, layout.rows, slots, value_states, written)
        if next_keys is None:
            return Window(self.keys.transpose(1, 2), self.values.transpose(1, 2))
        _write_slots(self.next_keys, layout.rows, slots, next_keys, written)
        ring_slots = torch.arange(-sinks, self.config.segment_length, device=self.keys.device)
        is_own = (ring_slots >= 0) & (ring_slots <= layout.offset.unsqueeze(1))
        keys = torch.where(is_own[:, None, :, None], self.keys, self.next_keys)
        return Window(keys.transpose(1, 2), self.values.transpose(1, 2))

    def decode_memory(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layout: DecodeLayout,
        write_strength: torch.Tensor | None,
    ) -> None:
        """
        Adds one token per row to what the open segment will write, and writes it where the segment ends.

        Args:
            key_states: as the memory gets them, `(B, 1, kv_heads, head_dim)`.
            value_states: `(B, 1, kv_heads, head_dim)`.
            write_strength: `(B, 1, kv_heads)`; `None` is 1.
        """
        features = feature_map(key_states.transpose(1, 2).to(self.memory.dtype))
        values = value_states.transpose(1, 2).to(self.memory.dtype)
        if layout.tokens is not None:
            features = features * layout.tokens[:, None, None, None]
        if self.config.use_mem_delta_rule:
            values = values - read_memory(features, self.memory, self.normaliser, self.config.memory_eps)
        if write_strength is not None:
            values = values * write_strength.transpose(1, 2).unsqueeze(-1)
        pending = MemoryState(
            self.pending_memory + features.transpose(-1, -2) * values, self.pending_normaliser + features.squeeze(2)
        )
        for name, added in zip(("memory", "normaliser"), pending):
            written = added * layout.is_last_of_segment.view(-1, *(1,) * (added.dim() - 1))
            setattr(self, name, getattr(self, name) + written)
            setattr(self, f"pending_{name}", added - written)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.config.num_sink_tokens + self.config.segment_length, 0

    def get_seq_length(self) -> int:
        raise NotImplementedError("The layers of an InfiniCache count nothing; use `cache.get_seq_length()`.")

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        if self.is_initialized:
            self.map_states(torch.zeros_like)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self.map_states(lambda state: state.index_select(0, indices.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.map_states(lambda state: state.repeat_interleave(repeats, 0))

    def offload(self) -> None:
        raise NotImplementedError("An InfiniCache is of constant size and is not offloaded.")


class CheckpointedLayer:
    """
    The cache of one layer for gradient checkpointing, which runs the layer again in the backward pass: each run
    starts from the state `before` the call, and the last one's is `after`.
    """

    def __init__(self, before: InfiniCacheLayer):
        self.before = before
        self.after: InfiniCacheLayer | None = None

    @property
    def layers(self) -> "CheckpointedLayer":
        return self

    def __getitem__(self, layer_idx: int) -> InfiniCacheLayer:
        self.after = copy.copy(self.before)
        return self.after


def _write_slots(
    ring: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, states: torch.Tensor, written: torch.Tensor | None
) -> None:
    """
    Writes `states` `(B, K, heads, dim)` into `slots` `(B, K)` of `ring` `(B, heads, S, dim)` where `written`; `rows`
    `(B, 1)` number the rows.
    """
    ring = ring.transpose(1, 2)
    if written is not None:
        states = torch.where(written[..., None, None], states, take(ring, slots))
    # On a CPU, scatter_ takes five times as long in bfloat16.
    ring.index_put_((rows, slots), states)
