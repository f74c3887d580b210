"""
The cache of an Infini-attention model: what all its layers remember of the streams, and how far these have been read.
Its size depends on the configuration and the batch alone, never on how many tokens were read.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

from .cache_files import read_cache, write_cache
from .cache_layer import InfiniCacheLayer, KeyStates, RecordedCall
from .configuration_infini import InfiniConfig
from .fingerprint import WeightsId
from .rotary import Angles, relative_angles
from .streams import DecodeLayout, SegmentLayout, plan_segments


logger = logging.get_logger(__name__)

# What transformers calls a cache in its calls and outputs: `past_key_values`, and from 5.24 on `cache`.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class StreamCounters:
    """
    How far each row of a cache has read; one for all layers.

    Attributes:
        columns: `()`, columns fed, padding included.
        tokens_read: `(batch,)`, tokens of each row's stream.
        slot_columns: `(batch, num_sink_tokens + N)`, the column whose token stands in each slot of the layers.
    """

    def __init__(self, batch_size: int, config: InfiniConfig, device: torch.device):
        self.num_sink_tokens = config.num_sink_tokens
        slots = config.num_sink_tokens + config.segment_length
        self.columns = torch.zeros((), dtype=torch.long, device=device)
        self.tokens_read = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.slot_columns = torch.zeros(batch_size, slots, dtype=torch.long, device=device)

    def map_rows(self, function) -> None:
        self.tokens_read = function(self.tokens_read)
        self.slot_columns = function(self.slot_columns)

    def fork(self) -> "StreamCounters":
        counters = object.__new__(StreamCounters)
        counters.num_sink_tokens = self.num_sink_tokens
        counters.columns = self.columns.clone()
        counters.tokens_read = self.tokens_read.clone()
        counters.slot_columns = self.slot_columns.clone()
        return counters

    def ring_columns(self) -> torch.Tensor:
        """Columns of the tokens in the ring, `(batch, N)`."""
        return self.slot_columns[:, self.num_sink_tokens :]

    def sink_columns(self, layout: SegmentLayout, columns: torch.Tensor) -> torch.Tensor:
        """Columns of each stream's sinks `(R, num_sink_tokens)` after a call of `columns` `(B, T)`."""
        old = layout.first_states(self.slot_columns[:, : self.num_sink_tokens])
        return torch.where(layout.sink_is_new, layout.sinks(columns), old)

    def call_columns(self, length: int) -> torch.Tensor:
        """Numbers of the next `length` columns, `(batch, length)`."""
        columns = self.columns + torch.arange(length, device=self.columns.device)
        return columns.expand(self.tokens_read.shape[0], -1)

    def advance(self, layout: SegmentLayout | DecodeLayout, length: int) -> None:
        """Counts a call of `length` columns."""
        columns = self.call_columns(length)
        if isinstance(layout, DecodeLayout):
            slots, written = layout.slots_with_sink(self.num_sink_tokens)
            if self.num_sink_tokens == 0:
                slots, written = slots[:, 1:], written[:, 1:]
            columns = torch.where(written, columns, self.slot_columns.gather(1, slots))
            self.slot_columns.scatter_(1, slots, columns)
        else:
            self.slot_columns[:, : self.num_sink_tokens] = layout.last_states(self.sink_columns(layout, columns))
            layout.write_ring(columns, self.ring_columns())
        self.tokens_read.copy_(layout.tokens_read)
        self.columns.add_(length)


def state_nbytes(config: InfiniConfig) -> int:
    """Bytes that the layers of an [`InfiniCache`] hold for each sequence, however much of it they have read."""
    # Saving a model leaves the name of its dtype in the configuration.
    dtype = getattr(torch, config.dtype) if isinstance(config.dtype, str) else config.dtype
    layer = InfiniCacheLayer(config)
    keys = torch.empty(1, config.num_key_value_heads, 1, config.head_dim, dtype=dtype, device="meta")
    layer.lazy_initialization(keys, keys)
    return config.num_hidden_layers * sum(state.nbytes for state in layer.states().values())


class InfiniCache(Cache):
    """
    The memories of an [`InfiniForCausalLM`] model: what it keeps of all that it has read, in constant size.

    Pass it as `past_key_values` to the model or to `generate()`, one call after the other, for a text of any length.
    Back-propagation goes through the cache. Copy it with `copy.deepcopy`.

    A cache belongs to the weights that have read into it: from its first call on, others are refused.

    Args:
        config ([`InfiniConfig`]): configuration of the model that will use the cache.

    Attributes:
        weights: the weights that have read into it; `None` before the first call.
        allow_other_weights: whether models of the same configuration with other weights may go on from it.

    Example:

    ```python
    >>> cache = InfiniCache(model.config)
    >>> for chunk in input_ids.split(8192, dim=1):
    ...     model(chunk, past_key_values=cache, logits_to_keep=1)
    >>> cache.save_pretrained("memory-of-a-book")
    ```
    """

    layers: list[InfiniCacheLayer]  # type: ignore[assignment]
    # As get_max_length() says it. PEFT asks a cache for it, to put one of its own in its place, which is then refused.
    max_cache_len = -1

    def __init__(self, config: InfiniConfig):
        super().__init__(layers=[InfiniCacheLayer(config) for _ in range(config.num_hidden_layers)])
        self.config = config
        self.memory_fields = config.memory_fields()
        self.counters: StreamCounters | None = None
        self.angle_table: Angles | None = None
        self._recording: _Recording | None = None
        self._is_reading = False
        self.weights: WeightsId | None = None
        self.allow_other_weights = False
        # Whether the last call was of one column.
        self.was_step = False
        # Of the generate() that runs: what ends a row, and where the generated tokens start.
        self.eos_token_ids: torch.Tensor | None = None
        self.prompt_length: int | None = None

    def __repr__(self):
        tokens = "empty" if self.counters is None else f"tokens_read={self.counters.tokens_read.tolist()}"
        return f"InfiniCache({tokens}, layers={len(self.layers)}, segment_length={self.config.segment_length})"

    @property
    def nbytes(self) -> int:
        """Size of all tensors of the cache, in bytes."""
        tensors = [*self.state_dict().values(), *(self.angle_table or ())]
        tensors += [
            state for layer in self.layers for call in layer.record or () for state in call if state is not None
        ]
        if self._recording is not None:
            tensors += [state for layer in self._recording.layers for state in layer.states().values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns fed, padding included: the place of the next column in the whole history."""
        return 0 if self.counters is None else int(self.counters.columns)

    @property
    def tokens_read(self) -> torch.Tensor | None:
        """`(batch,)`, number of tokens that each row's stream has read; `None` before the first call."""
        return None if self.counters is None else self.counters.tokens_read

    def start_call(self, batch_size: int, device: torch.device) -> StreamCounters:
        """The counters for a call of `batch_size` rows, made on the first call."""
        if self.counters is None:
            self.counters = StreamCounters(batch_size, self.config, device)
            if self._recording is not None:
                self._recording.counters = self.counters.fork()
        self._require_whole()
        self._notice_end_of_recording()
        if self.counters.tokens_read.shape[0] != batch_size:
            raise ValueError(
                f"The cache holds {self.counters.tokens_read.shape[0]} rows, but the inputs have {batch_size}. To "
                "continue each row several times (beams, num_return_sequences), first call "
                "`cache.batch_repeat_interleave(n)`, on a copy.deepcopy of the cache if you need it again."
            )
        # Tensors made in inference mode cannot be changed or saved for autograd outside of it.
        if (
            not torch.compiler.is_compiling()
            and any(state.is_inference() for state in (self.counters.tokens_read, *self.state_dict().values()))
            and not torch.is_inference_mode_enabled()
        ):
            self.counters, self.angle_table = self.counters.fork(), None
            for layer in self.layers:
                layer.map_states(torch.clone)
        return self.counters

    def require_weights(self, current: WeightsId, is_training: bool, dtype: torch.dtype) -> None:
        """
        Refuses other weights than those that have read into the cache; the first that do are its own.

        Args:
            current: those of the model that is about to use it.
            is_training: in which the weights of one model change while a memory goes on.
            dtype: that the model computes in.

        Raises:
            ValueError: if the weights are others, or it is not known which the cache had.
        """
        is_unbound = self.weights is None or self.allow_other_weights
        if is_unbound or (current.fingerprint is not None and current.fingerprint == self.weights.fingerprint):
            self.weights = current
            return
        if self.weights.model == current.model and (is_training or self.weights.fingerprint is None):
            self.weights = WeightsId(None, current.model)
            return
        if self.is_initialized and not torch.is_autocast_enabled(self.counters.columns.device.type):
            self.layers[0].require_dtype(dtype)
        raise ValueError(self.weights.refusal(current, "The cache"))

    def _require_whole(self) -> None:
        if self._is_reading:
            raise RuntimeError(
                "The last call with this cache was interrupted, and some of its layers have read what others have "
                "not. Go on from a copy or a saved cache, or `reset()` this one and read again."
            )

    def _notice_end_of_recording(self) -> None:
        if not all(layer.record_past for layer in self.layers):
            self._recording = None

    def begin_reading(self) -> None:
        """Marks the cache as half-read until `finish_call`."""
        self._is_reading = True

    def finish_call(
        self,
        layout: SegmentLayout | DecodeLayout,
        length: int,
        tokens: torch.Tensor | None,
        restarts: torch.Tensor | None,
    ) -> None:
        """Counts a call that all layers have read; its `tokens` and `restarts` are `(B, T)` bool or `None`."""
        self.counters.advance(layout, length)
        self._is_reading = False
        if self._recording is not None:
            self._recording.append(self, length, tokens, restarts)

    def detached(self) -> "InfiniCache":
        """
        An independent cache of the same state that no gradient flows out of, for training that goes on from here:
        back-propagation ends at it. Nothing is recorded in it.
        """
        cache = InfiniCache(self.config)
        cache.weights, cache.allow_other_weights = self.weights, self.allow_other_weights
        if self.counters is not None:
            is_between_segments = not (self.counters.tokens_read % self.config.segment_length).any()
            cache.layers = [layer.detached(is_between_segments) for layer in self.layers]
            cache.counters = self.counters.fork()
        cache.angle_table = self.angle_table
        return cache

    def early_initialization(self, batch_size, num_heads, head_dim, dtype, device):
        super().early_initialization(batch_size, num_heads, head_dim, dtype, device)
        self.start_call(batch_size, torch.device(device))

    def reset(self):
        """Forgets everything, also whose weights it was; the tensors stay allocated. Recording ends."""
        super().reset()
        if self.counters is not None:
            self.counters = StreamCounters(
                self.counters.tokens_read.shape[0], self.config, self.counters.tokens_read.device
            )
        self._recording = None
        self._is_reading = False
        self.weights, self.allow_other_weights = None, False
        for layer in self.layers:
            layer.record = None

    def _map_rows(self, function) -> None:
        if self.counters is not None:
            self.counters.map_rows(function)
        if self._recording is not None:
            self._recording.map_rows(function)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices`, in that order."""
        super().batch_select_indices(indices)
        self._map_rows(lambda state: state.index_select(0, indices.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda state: state.repeat_interleave(repeats, 0))

    def activate_past_recording(self) -> None:
        """From now on, keeps what it takes to `crop` up to `segment_length` columns."""
        self._notice_end_of_recording()
        if self._recording is None:
            self._recording = _Recording(self)
            for layer in self.layers:
                layer.record = []

    @property
    def records(self) -> bool:
        """Whether it keeps what it takes to `crop`."""
        self._notice_end_of_recording()
        return self._recording is not None

    def crop(self, tokens_to_remove: int) -> None:
        """
        Takes back the last columns, as if they had never been fed.

        Args:
            tokens_to_remove (`int`): minus the number of columns, at most `segment_length`, all of them fed since
                [`~InfiniCache.activate_past_recording`].

        Raises:
            ValueError: if more is to be taken back than was recorded; the cache is left as it was.
            RuntimeError: if the last call was interrupted.
        """
        count = -int(tokens_to_remove)
        if count < 0:
            raise ValueError(f"crop takes minus the number of columns to remove, got {tokens_to_remove}.")
        if count == 0:
            return
        self._require_whole()
        self._notice_end_of_recording()
        recorded = 0 if self._recording is None else min(self._recording.length, self.config.segment_length)
        if count > recorded:
            hint = (
                f"While recording, at most the last segment_length={self.config.segment_length} columns are kept."
                if self._recording is not None
                else "Call cache.activate_past_recording() before what may be taken back is fed."
            )
            raise ValueError(
                f"Cannot take back {count} columns: the cache has recorded {recorded}. A memory cannot forget what it "
                f"has not recorded. {hint}"
            )
        self._recording.restore(self, self._recording.length - count)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """
        Saves the cache to a folder, as one file: `infini_cache.safetensors`. An interrupted save leaves the cache that
        the folder held before. What was recorded for [`~InfiniCache.crop`] is not saved.

        Args:
            save_directory: the folder; made if it does not exist.

        Raises:
            ValueError: if nothing was read.
            RuntimeError: if the last call was interrupted.
        """
        if self.counters is None or not self.is_initialized:
            raise ValueError("The cache is empty: there is nothing to save before a model has read something.")
        self._require_whole()
        fingerprint = None if self.weights is None else self.weights.fingerprint
        if fingerprint is None and not self.allow_other_weights:
            logger.warning_once(
                "It is not known which weights made the memory that is saved: the model that read was in training "
                "mode, or compiled. To load it, from_pretrained will ask for allow_other_weights=True. Call "
                "model.eval() before the model reads."
            )
        tensors = self.state_dict() | {"columns": self.counters.columns}
        write_cache(Path(save_directory), tensors, self.config, fingerprint)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors of the cache by name, without what is recorded for [`~InfiniCache.crop`]."""
        tensors = {
            f"layers.{index}.{name}": state
            for index, layer in enumerate(self.layers)
            for name, state in layer.states().items()
        }
        if self.counters is not None:
            tensors |= {"tokens_read": self.counters.tokens_read, "slot_columns": self.counters.slot_columns}
        return tensors

    @classmethod
    def from_pretrained(
        cls,
        save_directory: str | os.PathLike,
        config: InfiniConfig | PreTrainedModel,
        device: torch.device | str | None = None,
        *,
        allow_other_weights: bool = False,
    ) -> "InfiniCache":
        """
        Loads a cache that [`~InfiniCache.save_pretrained`] saved. Whoever made the file, it is data and nothing else:
        loading it runs no code, writes nothing, and takes twice its size in memory at most.

        Args:
            save_directory: the folder.
            config: the model that will use the cache; or its configuration, in which case the first call finds whether
                the weights are those that made the cache.
            device: device of the model. Default: the model's, if it is given, or else the CPU.
            allow_other_weights: whether weights that did not make the cache may use it, or if it is not known which
                did. To others than these, a memory means something else.

        Raises:
            FileNotFoundError: if the folder holds no saved cache.
            ValueError: if what it holds is damaged, or was made by another model or version; the message says which.
        """
        model: Any = None
        if isinstance(config, nn.Module):
            # What wraps it may not pass on its attributes.
            model = next((module for module in config.modules() if hasattr(module, "weights_fingerprint")), None)
            if model is None:
                raise TypeError(f"{type(config).__name__} is no Infini-attention model, nor does it hold one.")
        own: InfiniConfig = config if model is None else model.config  # type: ignore[assignment]
        if device is None:
            device = "cpu" if model is None else model.device
        folder, cache = Path(save_directory), cls(own)
        fingerprint, tensors = read_cache(folder, own, partial(_meta_tensors, own))
        cache.weights, cache.allow_other_weights = WeightsId(fingerprint, None), allow_other_weights
        if model is not None and not allow_other_weights:
            current = WeightsId.of(model.base_model, anew=True)
            if fingerprint is None or fingerprint != current.fingerprint:
                if (dtype := tensors["layers.0.keys"].dtype) != model.dtype:
                    raise ValueError(
                        f"The cache in {folder} holds {dtype} keys, and the model is of {model.dtype}. Load the model "
                        f'that made it with dtype="{str(dtype).removeprefix("torch.")}", or read the text again.'
                    )
                raise ValueError(cache.weights.refusal(current, f"The cache in {folder}"))
        cache.counters = StreamCounters(len(tensors["tokens_read"]), own, torch.device(device))
        for name, tensor in tensors.items():
            holder: Any = cache.counters
            if name.startswith("layers."):
                _, index, name = name.split(".")
                holder = cache.layers[int(index)]
            setattr(holder, name, tensor.to(device))
        for layer in cache.layers:
            layer.device, layer.is_initialized = layer.keys.device, True
        return cache


def _meta_tensors(config: InfiniConfig, rows: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the file of a cache of `rows` rows holds, on the meta device."""
    cache = InfiniCache(config)
    cache.early_initialization(rows, config.num_key_value_heads, config.head_dim, dtype, "meta")
    return cache.state_dict() | {"columns": cache.counters.columns}


def one_cache(past_key_values, cache) -> InfiniCache | None:
    """The [`InfiniCache`] of a call, which may go by either of the names that transformers has had for it."""
    if past_key_values is not None and cache is not None:
        raise ValueError("You cannot specify both `cache` and `past_key_values`: they are two names of the same.")
    cache = past_key_values if cache is None else cache
    if cache is not None:
        require_infini_cache(cache)
    return cache


def require_infini_cache(cache) -> None:
    if not isinstance(cache, InfiniCache):
        raise TypeError(
            f"past_key_values must be an InfiniCache, got {type(cache).__name__}: no other cache holds the memory. "
            "Make one with InfiniCache(model.config), or leave it out."
        )


class _Recording:
    """
    What it takes to undo the last columns: the cache as it was before them, and their keys and values (kept by the
    layers). At least the last `segment_length` columns are recorded, and at most twice as many are kept.
    """

    def __init__(self, cache: InfiniCache):
        self.layers = [layer.fork() for layer in cache.layers]
        self.counters = None if cache.counters is None else cache.counters.fork()
        self.tokens: list[torch.Tensor] = []
        self.restarts: list[torch.Tensor] = []

    @property
    def length(self) -> int:
        """Number of columns recorded."""
        return sum(tokens.shape[1] for tokens in self.tokens)

    def map_rows(self, function) -> None:
        for layer in self.layers:
            if layer.is_initialized:
                layer.map_states(function)
        if self.counters is not None:
            self.counters.map_rows(function)
        self.tokens = [function(tokens) for tokens in self.tokens]
        self.restarts = [function(restarts) for restarts in self.restarts]

    def append(
        self, cache: InfiniCache, length: int, tokens: torch.Tensor | None, restarts: torch.Tensor | None
    ) -> None:
        shape, device = (cache.tokens_read.shape[0], length), cache.tokens_read.device
        self.tokens.append(torch.ones(shape, dtype=torch.bool, device=device) if tokens is None else tokens)
        self.restarts.append(torch.zeros(shape, dtype=torch.bool, device=device) if restarts is None else restarts)
        if self.length > 2 * cache.config.segment_length:
            self._advance(cache, self.length - cache.config.segment_length)

    def _advance(self, cache: InfiniCache, count: int) -> None:
        """Moves the first `count` recorded columns into the cache as it was before them."""
        tokens, restarts = torch.cat(self.tokens, 1), torch.cat(self.restarts, 1)
        self.layers, self.counters = self._replay(cache, tokens[:, :count], restarts[:, :count])
        self.tokens, self.restarts = [tokens[:, count:].clone()], [restarts[:, count:].clone()]
        for layer in cache.layers:
            layer.record = [RecordedCall.joined(layer.record).map(lambda states: states[:, count:].clone())]

    def restore(self, cache: InfiniCache, count: int) -> None:
        """Puts `cache` back to where it was after the first `count` recorded columns."""
        tokens, restarts = torch.cat(self.tokens, 1)[:, :count], torch.cat(self.restarts, 1)[:, :count]
        layers, counters = self._replay(cache, tokens, restarts)
        self.tokens, self.restarts = [tokens], [restarts]
        for layer, restored in zip(cache.layers, layers):
            record = RecordedCall.joined(layer.record).map(lambda states: states[:, :count])
            layer.reset()
            for name, state in restored.states().items():
                setattr(layer, name, state)
            layer.record = [record]
        cache.counters = counters

    def _replay(
        self, cache: InfiniCache, tokens: torch.Tensor, restarts: torch.Tensor
    ) -> tuple[list[InfiniCacheLayer], StreamCounters]:
        """The cache as it was before the recorded columns, advanced by the first of them, `(B, K)`."""
        config, counters, count = cache.config, self.counters.fork(), tokens.shape[1]
        layers = [layer.fork() for layer in self.layers]
        if count == 0:
            return layers, counters
        layout = plan_segments(
            tokens.shape,
            tokens,
            restarts,
            counters.tokens_read,
            config.segment_length,
            config.num_sink_tokens,
            tokens.device,
        )
        angles = relative_angles(cache.angle_table, layout.offsets, config)
        for layer, source in zip(layers, cache.layers):
            call = RecordedCall.joined(source.record).map(lambda states: states[:, :count])
            layer_layout, layer_angles = layout.to(call.keys.device), angles.to(call.keys.device)
            key_states = KeyStates.rotated(call.keys, layer_angles, layer_layout, call.memory_keys)
            layer.update(key_states, call.values, layer_layout, call.write_strength)
        counters.advance(layout, count)
        return layers, counters


__all__ = ["InfiniCache", "state_nbytes"]
