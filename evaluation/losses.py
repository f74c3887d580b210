"""Losses of the tokens of a long document: streamed, in windows, with the memory shut out, or with another's."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_infini import InfiniConfig, state_nbytes


# Is told the number of tokens scored since the last call.
Progress = Callable[[int], object]


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`logits` `(tokens, vocabulary)`, `targets` `(tokens,)` -> `(tokens,)`, at least in float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits, targets.to(logits.device), reduction="none").cpu()


class _Reading:
    """A document on its way through a model and a cache of its own."""

    def __init__(self, model: PreTrainedModel, input_ids: torch.Tensor):
        self.model = model
        self.cache: Any = None
        self.inputs, self.targets = input_ids[:, :-1], input_ids[0, 1:]
        self.losses: list[torch.Tensor] = []

    def read(self, start: int, end: int, chunk_length: int, progress: Progress | None) -> None:
        """Reads the tokens from `start` to before `end`, as far as there are any."""
        end = min(end, len(self.targets))
        for first in range(start, end, chunk_length):
            part = slice(first, min(first + chunk_length, end))
            chunk = self.inputs[:, part].to(self.model.device)
            outputs = self.model(chunk, past_key_values=self.cache, use_cache=True)
            self.cache = outputs.past_key_values
            self.losses.append(_losses(outputs.logits[0], self.targets[part]))
            if progress is not None:
                progress(chunk.shape[1])

    def take_memory(self, other: "_Reading") -> None:
        """Puts the memory of another reading in the place of its own; the window and the sinks stay."""
        for layer, source in zip(self.cache.layers, other.cache.layers):
            for name in source.states().keys() - set(source.WINDOW_STATES):
                setattr(layer, name, getattr(source, name).clone())


@torch.no_grad()
def token_losses(
    model: PreTrainedModel, input_ids: torch.Tensor, chunk_length: int, progress: Progress | None = None
) -> torch.Tensor:
    """
    Losses of the tokens of a document, each given all before it. It is read chunk by chunk through the model's own
    cache: in constant memory if that is an [`InfiniCache`], whatever the chunks.

    Args:
        input_ids: `(1, tokens)`.
        chunk_length: number of tokens in a call; logits of one chunk exist at a time.

    Returns:
        `(tokens - 1,)` on the CPU, in nats, at least in float32: entry i is the loss of token i + 1, since nothing
        predicts the first.
    """
    reading = _Reading(model, input_ids)
    reading.read(0, input_ids.shape[1], chunk_length, progress)
    return torch.cat(reading.losses)


@torch.no_grad()
def foreign_losses(
    model: PreTrainedModel,
    documents: Mapping[str, torch.Tensor],
    memory_of: Mapping[str, str],
    chunk_length: int,
    progress: Progress | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    Losses of documents with their own memory and with that of another one. All are read side by side, segment by
    segment, each through a cache of its own. A document in `memory_of` is read a second time: before each of its
    segments, what its layers hold of complete segments is replaced by what the other document, read with its own
    memory, has left after as many tokens. Its window and its sinks are its own. Where the other document has no such
    segment any more, its last memory stays.

    Args:
        model: an Infini-attention model.
        documents: ids `(1, tokens)` by name.
        memory_of: by the name of a document, that of the one whose memory it is given.
        chunk_length: number of tokens in a call, at most; calls end where segments do.

    Returns:
        Of all documents with their own memory, and of those in `memory_of` with the other: `(tokens - 1,)` each, as
        [`token_losses`].
    """
    segment_length = model.config.segment_length
    own = {name: _Reading(model, ids) for name, ids in documents.items()}
    foreign = {name: _Reading(model, documents[name]) for name in memory_of}
    for start in range(0, max(ids.shape[1] for ids in documents.values()) - 1, segment_length):
        segment = start, start + segment_length
        for name, reading in foreign.items():
            if start > 0:
                reading.take_memory(own[memory_of[name]])
            reading.read(*segment, chunk_length, progress)
        for reading in own.values():
            reading.read(*segment, chunk_length, progress)
    return (
        {name: torch.cat(reading.losses) for name, reading in own.items()},
        {name: torch.cat(reading.losses) for name, reading in foreign.items()},
    )


def require_window(config: PreTrainedConfig, window: int) -> None:
    """Raises ValueError if a model cannot read windows of so many tokens, that overlap by a half."""
    longest = config.max_position_embeddings
    if not 2 <= window <= longest:
        raise ValueError(f"window={window} must be at least 2 and at most max_position_embeddings={longest}.")


@torch.no_grad()
def window_losses(
    model: PreTrainedModel, input_ids: torch.Tensor, window: int, progress: Progress | None = None
) -> torch.Tensor:
    """
    Losses of the tokens of a document, by a model that cannot read it whole: in windows that overlap by a half, of
    which only the second half is scored. So each token is given the `window / 2` to `window` tokens before it, or all
    of them where there are fewer.

    Args:
        input_ids: `(1, tokens)`.
        window: number of tokens in a window.

    Returns:
        `(tokens - 1,)`, as [`token_losses`].

    Raises:
        ValueError: if a window is longer than the model's `max_position_embeddings`, or too short to be halved.
    """
    require_window(model.config, window)
    losses: list[torch.Tensor] = []
    scored = 1
    for start in range(0, input_ids.shape[1], window // 2):
        ids = input_ids[:, start : start + window]
        targets = input_ids[0, scored : start + window]
        if len(targets) == 0:
            break
        # The last token predicts nothing in this window.
        outputs = model(ids.to(model.device), use_cache=False, logits_to_keep=len(targets) + 1)
        losses.append(_losses(outputs.logits[0, :-1], targets))
        scored += len(targets)
        if progress is not None:
            progress(len(targets))
    return torch.cat(losses)


@contextmanager
def memory_off(model: nn.Module, matrix: bool = True, slots: bool = True) -> Iterator[None]:
    """
    Shuts the memory out: inside, an Infini-attention model is one of local attention alone.

    The weights are not touched. A hook replaces what each gate returns by 1, the whole for local attention, whatever
    its scale and dtype, also where PEFT has wrapped the model or the gates; large weights would do the same only where
    the scale is positive and the sigmoid rounds to 1 (logits from 17 in float32, from 37 in float64).
    `lerp(read, local, 1)` is then `local` bit for bit. A model compiled before does not see the hooks.

    Args:
        matrix: shut out what is read from M and z.
        slots: do without memory slots, if there are any. A cache from outside is then one of another model.

    Raises:
        TypeError: if it is no Infini-attention model.
    """
    found: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    configs = {id(config): config for config in found if hasattr(config, "segment_length")}
    if not configs:
        raise TypeError(f"{type(model).__name__} has no memory to shut out: it is no Infini-attention model.")
    with ExitStack() as changes:
        # Layers without a memory have no gates.
        for module in model.modules() if matrix else ():
            if hasattr(module, "head_gates"):
                gates: Any = module.head_gates
                handle = gates.register_forward_hook(lambda module, arguments, share: torch.ones_like(share))
                changes.callback(handle.remove)
        for config in configs.values():
            if slots and config.num_memory_slots > 0:
                changes.callback(setattr, config, "num_memory_slots", config.num_memory_slots)
                config.num_memory_slots = 0
        yield


def window_of_state(config: InfiniConfig, dtype: Any) -> int:
    """
    Number of tokens of a segment with which a model without its memory would have as much state, or just less.

    Args:
        dtype: of the model, whose keys and values have it, whatever its configuration was saved with.

    Raises:
        ValueError: if the base has no positions for such segments.
    """
    config = copy.deepcopy(config)
    config.dtype = dtype
    nbytes, segment_length = state_nbytes(config), config.segment_length
    config.memory_layers, config.num_memory_slots = [], 0
    without_memory = state_nbytes(config)
    config.segment_length *= 2
    nbytes_per_token = (state_nbytes(config) - without_memory) / segment_length
    config.segment_length = segment_length + int((nbytes - without_memory) / nbytes_per_token)
    if config.longest_distance > config.max_position_embeddings:
        raise ValueError(
            f"There is no longer window of the same state to compare with: it would have {config.segment_length:,} "
            f"tokens, and reach {config.longest_distance:,}, but max_position_embeddings="
            f"{config.max_position_embeddings:,}. Leave the comparison out, or convert with fewer slots."
        )
    return config.segment_length


@contextmanager
def longer_window(model: PreTrainedModel) -> Iterator[int]:
    """
    Spends the memory's state on longer segments: inside, an Infini-attention model is one of local attention alone,
    with as many more tokens as fit in the bytes of its memory. A cache from outside is then one of another model.

    Yields:
        Number of tokens of a segment.

    Raises:
        ValueError: if the base has no positions for such segments.
    """
    config: Any = model.config
    length, segment_length = window_of_state(config, model.dtype), config.segment_length
    with memory_off(model):
        config.segment_length = length
        try:
            yield length
        finally:
            config.segment_length = segment_length
