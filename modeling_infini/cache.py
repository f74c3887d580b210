"""
The cache of an Infini-attention model: what all its layers remember of the streams, and how far these have been read.
Its size depends on the configuration and the batch alone, never on how many tokens were read.
"""

import copy
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

from .cache_layer import CheckpointedLayer, InfiniCacheLayer, LayerPast, TokenStates
from .configuration_infini import InfiniConfig, is_infini_config
from .fingerprint import WeightsId, hooks_of
from .local_attention import Angles
from .streams import DecodeLayout, Layout, plan_call, plan_segments, streams_of_call


logger = logging.get_logger(__name__)

CACHE_FILE = "infini_cache.safetensors"
FORMAT = "infini_cache"
FORMAT_VERSION = 4
FIELDS = {"format_version": (int,), "model": (dict,), "weights": (str, type(None))}
REMEDY = f"This code reads version {FORMAT_VERSION}: read the text again with the model, and save the cache anew."
# Bytes of a header that no cache needs: Python's objects take many times the room of the JSON that they are read from.
MAX_HEADER = 1_000_000
# More columns than that do not fit the sums of two such numbers.
MAX_COLUMNS = 2**60
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

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
        slots = config.num_sink_tokens + config.segment_length
        self.columns = torch.zeros((), dtype=torch.long, device=device)
        self.tokens_read = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.slot_columns = torch.zeros(batch_size, slots, dtype=torch.long, device=device)

    def map_rows(self, function) -> None:
        self.tokens_read = function(self.tokens_read)
        self.slot_columns = function(self.slot_columns)

    def fork(self) -> "StreamCounters":
        counters = copy.copy(self)
        counters.columns = self.columns.clone()
        counters.map_rows(torch.clone)
        return counters

    def advance(self, layout: Layout, length: int) -> torch.Tensor:
        """Counts a call of `length` columns; returns the column in each slot of its windows, `(G, window)`."""
        columns = self.columns + torch.arange(length, device=self.columns.device)
        window_columns = layout.update(columns.expand(self.tokens_read.shape[0], -1), self.slot_columns)
        self.tokens_read.copy_(layout.tokens_read)
        self.columns.add_(length)
        return window_columns


class Past:
    """
    What a model goes on from in a call: here, nothing was read before, and the call is not kept. Others say what was
    read: an [`InfiniCache`], or the other ranks of a sequence that is split over several.

    Attributes:
        counters: `None`: nothing was read.
        angle_table: of [`angle_table`], where it is kept.
    """

    counters: StreamCounters | None = None
    angle_table: Angles | None = None

    @property
    def tokens_read(self) -> torch.Tensor | None:
        """`(batch,)`, number of tokens that each row's stream has read; `None` before the first call."""
        return None if self.counters is None else self.counters.tokens_read

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns fed, padding included: the place of the next column in the whole history."""
        return 0 if self.counters is None else int(self.counters.columns)

    def plan_call(
        self,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        shape: tuple[int, int],
        config: InfiniConfig,
        device: torch.device,
        packing: dict[str, torch.Tensor],
    ) -> Layout:
        """The layout of a call; arguments as those of [`streams.plan_call`]."""
        return plan_call(attention_mask, position_ids, shape, None, config, device, packing)

    def window_columns(self, layout: Layout, shape: Sequence[int]) -> tuple[torch.Tensor, int]:
        """The column in each slot of a call's windows, `(G, window)`, and the number of columns up to its end."""
        new = StreamCounters(shape[0], layout.config, layout.tokens_read.device)
        counters = new if self.counters is None else self.counters.fork()
        return counters.advance(layout, shape[1]), self.get_seq_length() + shape[1]

    def check_targets(self, labels: torch.Tensor | None, has_targets: bool, num_items_in_batch: Any) -> None:
        """Refuses targets whose loss would be another one than that of the sequence."""

    def begin_call(self, layout: Layout, may_run_again: bool) -> Sequence[LayerPast | CheckpointedLayer]:
        """What each layer goes on from; with `may_run_again`, the backward pass may run a layer another time."""
        config = layout.config
        return [LayerPast(layer in config.layers_with_memory) for layer in range(config.num_hidden_layers)]

    def finish_call(self, layout: Layout, length: int, layers: Sequence[LayerPast | CheckpointedLayer]) -> None:
        """Counts a call that all `layers` of `begin_call` have read."""


class InfiniCache(Past, Cache):
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
        require_config(config)
        Cache.__init__(self, layers=[InfiniCacheLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.config = config
        self.memory_fields = config.memory_fields()
        self._recording: _Recording | None = None
        self._is_reading = False
        # In a compiled step, the tensors that it goes on from.
        self._before_step: list[dict[str, torch.Tensor]] | None = None
        self.weights: WeightsId | None = None
        self.allow_other_weights = False
        # Whether the last call was of one column.
        self.was_step = False

    def __repr__(self):
        tokens = "empty" if self.counters is None else f"tokens_read={self.counters.tokens_read.tolist()}"
        return f"InfiniCache({tokens}, layers={len(self.layers)}, segment_length={self.config.segment_length})"

    @property
    def nbytes(self) -> int:
        """Size of all tensors of the cache, in bytes."""
        tensors = [*self.state_dict().values(), *(self.angle_table or ())]
        if self.recording is not None:
            tensors += self.recording.before.state_dict().values()
            tensors += [state for layer in self.layers for call in layer.record for state in call if state is not None]
        return sum(tensor.nbytes for tensor in tensors)

    def plan_call(self, attention_mask, position_ids, shape, config, device, packing):
        tokens_read = self.tokens_read
        self.start_call(shape[0], device)
        if shape[1] > 1:
            return plan_call(attention_mask, position_ids, shape, tokens_read, config, device, packing)
        is_token, restarts = streams_of_call(attention_mask, position_ids, shape, tokens_read, packing)
        return DecodeLayout(is_token, restarts, self.counters.tokens_read, config)

    def start_call(self, batch_size: int, device: torch.device) -> None:
        """Makes the counters on the first call, and refuses a call that cannot go on from here."""
        if self.counters is None:
            self.counters = StreamCounters(batch_size, self.config, device)
        self._require_whole()
        if self.counters.tokens_read.shape[0] != batch_size:
            raise ValueError(
                f"The cache holds {self.counters.tokens_read.shape[0]} rows, but the inputs have {batch_size}. To "
                "continue each row several times (beams, num_return_sequences), first call "
                "`cache.batch_repeat_interleave(n)`, on a copy.deepcopy of the cache if you need it again."
            )
        # Tensors made in inference mode cannot be changed or saved for autograd outside of it.
        if (
            not torch.compiler.is_compiling()
            and any(state.is_inference() for state in self.saved_tensors().values())
            and not torch.is_inference_mode_enabled()
        ):
            self.counters, self.angle_table = self.counters.fork(), None
            for layer in self.layers:
                layer.map_states(torch.clone)

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

    def begin_call(self, layout, may_run_again):
        # Half-read until all layers have.
        self._is_reading = True
        self._before_step = None
        if torch.compiler.is_compiling() and isinstance(layout, DecodeLayout) and not torch.is_grad_enabled():
            self._before_step = [{} if layer.is_shared_with_graph else layer.states() for layer in self.layers]
        return [CheckpointedLayer(layer) for layer in self.layers] if may_run_again else self.layers

    def finish_call(self, layout, length, layers):
        self.layers = [layer.after if isinstance(layer, CheckpointedLayer) else layer for layer in layers]
        self.counters.advance(layout, length)
        if self._before_step is not None:
            for layer, states in zip(self.layers, self._before_step):
                layer.write_into(states)
            self._before_step = None
        elif length > 1 and layout.tokens_read.is_cuda and not torch.compiler.is_compiling():
            # A compiled step that writes into them can then be a CUDA graph.
            for state in self.saved_tensors().values():
                torch._dynamo.mark_static_address(state, guard=False)
        self._is_reading = False
        if self.recording is not None:
            self.recording.append(self, layout, length)

    def fork(self) -> "InfiniCache":
        """An independent cache of the same state. Nothing is recorded in it."""
        cache = copy.copy(self)
        cache.layers, cache._recording = [layer.fork() for layer in self.layers], None
        cache.counters = None if self.counters is None else self.counters.fork()
        return cache

    @torch.no_grad()
    def detached(self) -> "InfiniCache":
        """
        An independent cache of the same state that no gradient flows out of, for training that goes on from here:
        back-propagation ends at it. Nothing is recorded in it.
        """
        cache = self.fork()
        if self.is_initialized and not (self.counters.tokens_read % self.config.segment_length).any():
            for layer in cache.layers:
                layer.leave_segment()
        return cache

    def early_initialization(self, batch_size, num_heads, head_dim, dtype, device):
        super().early_initialization(batch_size, num_heads, head_dim, dtype, device)
        self.start_call(batch_size, torch.device(device))

    def reset(self):
        """Forgets everything, also whose weights it was; the tensors stay allocated. Recording ends."""
        super().reset()
        if self.counters is not None:
            self.counters = StreamCounters(len(self.tokens_read), self.config, self.tokens_read.device)
        self._recording = None
        self._is_reading = False
        self.weights, self.allow_other_weights = None, False

    def map_rows(self, function) -> None:
        for layer in self.layers:
            layer.map_states(function)
        if self.counters is not None:
            self.counters.map_rows(function)
        if self.recording is not None:
            self.recording.map_rows(function)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices`, in that order."""
        self.map_rows(lambda state: state.index_select(0, indices.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times."""
        self.map_rows(lambda state: state.repeat_interleave(repeats, 0))

    def activate_past_recording(self) -> None:
        """From now on, keeps what it takes to `crop` up to `segment_length` columns."""
        if self.recording is None:
            self._recording = _Recording(self)
            for layer in self.layers:
                layer.record = []

    @property
    def recording(self) -> "_Recording | None":
        """What it takes to `crop`, if that is kept."""
        # generate() ends it layer by layer.
        if not all(layer.record_past for layer in self.layers):
            self._recording = None
        return self._recording

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
        recorded = 0 if self.recording is None else min(self.recording.length, self.config.segment_length)
        if count > recorded:
            hint = (
                f"While recording, at most the last segment_length={self.config.segment_length} columns are kept."
                if self.recording is not None
                else "Call cache.activate_past_recording() before what may be taken back is fed."
            )
            raise ValueError(
                f"Cannot take back {count} columns: the cache has recorded {recorded}. A memory cannot forget what it "
                f"has not recorded. {hint}"
            )
        self.recording.restore(self, self.recording.length - count)

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
        if not self.is_initialized or self.get_seq_length() == 0:
            raise ValueError("The cache is empty: there is nothing to save before a model has read something.")
        self._require_whole()
        fingerprint = None if self.weights is None else self.weights.fingerprint
        if fingerprint is None and not self.allow_other_weights:
            logger.warning_once(
                "It is not known which weights made the memory that is saved: the model that read was in training "
                "mode, or compiled. To load it, from_pretrained will ask for allow_other_weights=True. Call "
                "model.eval() before the model reads."
            )
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.saved_tensors().items()}
        fields = {"format_version": FORMAT_VERSION, "model": self.config.memory_fields(), "weights": fingerprint}
        text, folder = json.dumps(fields), Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        # Not by the process's number: two machines that share a disk may have the same.
        temporary = folder / f".{CACHE_FILE}.{uuid4().hex}.tmp"
        try:
            # Not by save_file, whose files nobody else may read.
            with temporary.open("wb") as stream:
                stream.write(save(tensors, {FORMAT: text, "sha256": digest_of(text, tensors)}))
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(folder / CACHE_FILE)
        finally:
            temporary.unlink(missing_ok=True)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors `(batch, ...)` of the cache by name, without what is recorded for [`~InfiniCache.crop`]."""
        tensors = {
            f"layers.{index}.{name}": state
            for index, layer in enumerate(self.layers)
            for name, state in layer.states().items()
        }
        if self.counters is not None:
            tensors |= {"tokens_read": self.counters.tokens_read, "slot_columns": self.counters.slot_columns}
        return tensors

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """What a file holds, by name."""
        return self.state_dict() | {"columns": self.counters.columns}

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
            device: device of the model. Default: where the model and each of its layers compute, if it is given, or
                else the CPU.
            allow_other_weights: whether weights that did not make the cache may use it, or if it is not known which
                did. To others than these, a memory means something else.

        Raises:
            FileNotFoundError: if the folder holds no saved cache.
            ValueError: if what it holds is damaged, or was made by another model or version; the message says which.
        """
        model: Any = None
        if isinstance(config, nn.Module):
            # By their classes: some wrappers have the attributes of what they wrap, others have not.
            found = (module for module in config.modules() if hasattr(type(module), "weights_fingerprint"))
            model = next(found, None)
            if model is None:
                raise TypeError(f"{type(config).__name__} is no Infini-attention model, nor does it hold one.")
        own: InfiniConfig = config if model is None else model.config  # type: ignore[assignment]
        require_config(own)
        folder = Path(save_directory)
        fingerprint, tensors = read_cache(folder, own)
        weights, dtype = WeightsId(fingerprint, None), tensors["layers.0.keys"].dtype
        if model is not None and not allow_other_weights:
            current = WeightsId.of(model.base_model, anew=True)
            if fingerprint is None or fingerprint != current.fingerprint:
                if dtype != model.dtype:
                    raise ValueError(
                        f"The cache in {folder} holds {dtype} keys, and the model is of {model.dtype}. Load the model "
                        f'that made it with dtype="{str(dtype).removeprefix("torch.")}", or read the text again.'
                    )
                raise ValueError(weights.refusal(current, f"The cache in {folder}"))
        follows_model = device is None and model is not None
        if device is None:
            device = device_of(model.get_input_embeddings()) if follows_model else "cpu"
        cache = cls._empty(own, len(tensors["tokens_read"]), dtype, device)
        if follows_model:
            for layer, module in zip(cache.layers, model.base_model.layers):
                layer.map_states(functools.partial(torch.Tensor.to, device=device_of(module)))
        cache.weights, cache.allow_other_weights = weights, allow_other_weights
        for name, state in cache.saved_tensors().items():
            state.copy_(tensors[name])
        return cache

    @classmethod
    def _empty(
        cls, config: InfiniConfig, rows: int, dtype: torch.dtype, device: torch.device | str = "meta"
    ) -> "InfiniCache":
        """One that has its tensors; on the meta device, they take no memory."""
        cache = cls(config)
        cache.early_initialization(rows, config.num_key_value_heads, config.head_dim, dtype, device)
        return cache


def device_of(module: nn.Module) -> Any:
    """Where a module computes: between its calls, accelerate may keep its weights elsewhere, and none in them."""
    places = (getattr(hook, "execution_device", None) for hook in hooks_of(module))
    return next((place for place in places if place is not None), next(module.parameters()).device)


def state_nbytes(config: InfiniConfig) -> int:
    """Bytes that the layers of an [`InfiniCache`] hold for each sequence, however much of it they have read."""
    # Saving a model leaves the name of its dtype in the configuration.
    dtype = getattr(torch, config.dtype) if isinstance(config.dtype, str) else config.dtype
    layers = InfiniCache._empty(config, 1, dtype).layers
    return sum(state.nbytes for layer in layers for state in layer.states().values())


def read_cache(folder: Path, config: InfiniConfig) -> tuple[str | None, dict[str, torch.Tensor]]:
    """
    The fingerprint and tensors of a cache that [`~InfiniCache.save_pretrained`] saved; `config` is that of the model
    that will use it.

    Raises:
        FileNotFoundError: if the folder holds no saved cache.
        ValueError: if it is damaged, or was made by another model or version.
    """
    file = folder / CACHE_FILE
    if not file.is_file():
        if (folder / "infini_cache.json").is_file():
            raise ValueError(f"The cache in {folder} has an earlier format, of several files. {REMEDY}")
        raise FileNotFoundError(
            f"{folder} holds no saved cache: there is no {CACHE_FILE}. Name a folder that "
            "past_key_values.save_pretrained(folder) or infini read --save-memory made."
        )
    damage = f"The cache in {folder} is damaged:"
    with file.open("rb") as stream:
        if int.from_bytes(stream.read(8), "little") > MAX_HEADER:
            raise ValueError(f"{damage} the header of {CACHE_FILE} is longer than {MAX_HEADER:,} bytes.")
    try:
        with safe_open(file, "pt") as content:
            texts = content.metadata() or {}
            names = content.keys()
            # Clones: what is read is a view of the file.
            tensors = {name: content.get_tensor(name).clone() for name in names}
        text = texts.get(FORMAT, "{}")
        digest, fields = digest_of(text, tensors), json.loads(text)
    # Of dtypes that safetensors knows and PyTorch does not, there is no error of one kind.
    except (SafetensorError, AttributeError, OSError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{damage} {CACHE_FILE} cannot be read ({error}).") from error
    if not isinstance(fields, dict) or "format_version" not in fields:
        raise ValueError(f"{file} does not describe a cache of an Infini-attention model.")
    if (version := fields["format_version"]) != FORMAT_VERSION:
        raise ValueError(f"The cache in {folder} has format version {version!r:.20}. {REMEDY}")
    if texts.get("sha256") != digest:
        raise ValueError(f"{damage} {CACHE_FILE} is not what was saved.")
    if fields.keys() != FIELDS.keys() or any(type(fields[name]) not in FIELDS[name] for name in FIELDS):
        raise ValueError(f"{damage} its metadata must have the fields {', '.join(FIELDS)}, each of its kind.")
    config.require_same_memory(fields["model"], f"The cache in {folder}")
    absent = torch.empty(1)
    rows, dtype = tensors.get("tokens_read", absent).numel(), tensors.get("layers.0.keys", absent).dtype
    wanted = InfiniCache._empty(config, max(rows, 1), dtype if dtype in DTYPES else absent.dtype).saved_tensors()
    for name in sorted(wanted.keys() | tensors.keys()):
        here, fit = (
            f"{of[name].dtype} {tuple(of[name].shape)}" if name in of else "missing" for of in (tensors, wanted)
        )
        if here != fit:
            raise ValueError(f"The cache in {folder} does not fit this model: {name:.50} is {here}, not {fit}.")
        if tensors[name].is_floating_point() and not tensors[name].isfinite().all():
            raise ValueError(f"{damage} {name} holds NaN or infinity.")
    columns, read, slots = (tensors[name] for name in ("columns", "tokens_read", "slot_columns"))
    kept = [tensor for name, tensor in tensors.items() if name.endswith(".slot_places")]
    limits = (
        (columns, MAX_COLUMNS),
        (read, columns + 1),
        (slots, max(columns, 1)),
        *((places, columns + 1) for places in kept),
    )
    if any(values.min() < 0 or values.max() >= limit for values, limit in limits):
        raise ValueError(f"{damage} what it says to have read where cannot be.")
    return fields["weights"], tensors


def digest_of(text: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def one_past(past_key_values, cache) -> Any:
    """What a call goes on from, which may go by either of the names that transformers has had for it."""
    if past_key_values is not None and cache is not None:
        raise ValueError("You cannot specify both `cache` and `past_key_values`: they are two names of the same.")
    past = past_key_values if cache is None else cache
    # By what it does: remote code has classes of its own, and its cache must be of them.
    if past is not None and (isinstance(past, Cache) or not hasattr(past, "plan_call")):
        require_infini_cache(past)
    return past


def require_config(config) -> None:
    if not is_infini_config(config):
        raise TypeError(
            f"A cache is for a model's configuration, model.config, got a {type(config).__name__}. "
            "InfiniCache.from_pretrained takes the model itself as well, but no path of one."
        )


def require_infini_cache(cache) -> None:
    if not isinstance(cache, InfiniCache):
        raise TypeError(
            f"past_key_values must be an InfiniCache, got {type(cache).__name__}: no other cache holds the memory. "
            "Make one with InfiniCache(model.config), or leave it out."
        )


class _Recording:
    """
    What it takes to undo the last columns: the cache as it was before them, and what its layers made of them (kept by
    the layers). At least the last `segment_length` columns are recorded, and at most twice as many are kept.

    Attributes:
        before: that cache.
        calls: `is_token` and `restarts` of each recorded call, `(batch, T)` bool.
    """

    def __init__(self, cache: InfiniCache):
        self.before = cache.fork()
        self.calls: list[tuple[torch.Tensor, ...]] = []

    @property
    def length(self) -> int:
        """Number of columns recorded."""
        return sum(is_token.shape[1] for is_token, _ in self.calls)

    def map_rows(self, function) -> None:
        self.before.map_rows(function)
        self.calls = [(function(is_token), function(restarts)) for is_token, restarts in self.calls]

    def append(self, cache: InfiniCache, layout: Layout, length: int) -> None:
        everywhere = torch.ones(cache.tokens_read.shape[0], length, dtype=torch.bool, device=cache.tokens_read.device)
        is_token = everywhere if layout.is_token is None else layout.is_token
        self.calls.append((is_token, ~everywhere if layout.restarts is None else layout.restarts))
        segment_length = cache.config.segment_length
        if self.length > 2 * segment_length:
            count = self.length - segment_length
            self.before = self._replay(cache, count)
            self._keep(cache, slice(count, None))

    def restore(self, cache: InfiniCache, count: int) -> None:
        """Puts `cache` back to where it was after the first `count` recorded columns."""
        restored = self._replay(cache, count)
        self._keep(cache, slice(count))
        for layer, of_cache in zip(restored.layers, cache.layers):
            layer.record = of_cache.record
        cache.layers, cache.counters = restored.layers, restored.counters

    def _replay(self, cache: InfiniCache, count: int) -> InfiniCache:
        """The cache as it was after the first `count` recorded columns."""
        replayed = self.before.fork()
        is_token, restarts = (torch.cat(parts, 1)[:, :count] for parts in zip(*self.calls))
        replayed.start_call(len(is_token), is_token.device)
        if count == 0:
            return replayed
        layout = plan_segments(is_token, restarts, is_token.shape, replayed.tokens_read, cache.config, is_token.device)
        for layer, source in zip(replayed.layers, cache.layers):
            call = TokenStates.joined(source.record).map(lambda states: states[:, :count])
            layer.update(call, layout.to(call.keys.device))
        replayed.counters.advance(layout, count)
        return replayed

    def _keep(self, cache: InfiniCache, columns: slice) -> None:
        """Keeps the record of some columns alone."""
        self.calls = [tuple(torch.cat(parts, 1)[:, columns] for parts in zip(*self.calls))]
        for layer in cache.layers:
            layer.record = [TokenStates.joined(layer.record).map(lambda states: states[:, columns].clone())]


__all__ = ["InfiniCache", "Past", "state_nbytes"]
