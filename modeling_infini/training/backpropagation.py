"""
Back-propagation through sequences of any length, with the activations of one chunk at a time.

A sequence is read in chunks of whole segments. With s_c the state of the cache before chunk c (memories, normalisers,
window, open segment) and w the weights, each chunk is loss_c(s_c, w), s_{c+1} = f_c(s_c, w), and

    dL/ds_c = dloss_c/ds_c + (df_c/ds_c)^T dL/ds_{c+1}
    dL/dw   = sum over c of dloss_c/dw + (df_c/dw)^T dL/ds_{c+1}

Going forward only the s_c are kept. Going back, each chunk is run again from its s_c with autograd on, and hands
dL/ds_c to the chunk before it. The gradients are those of one pass over the whole sequence.

`detach_every_num_segments` ends back-propagation at every k-th segment, and goes back as it goes.
"""

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import TransformersKwargs

from ..cache import InfiniCache
from ..streams import PACKING_ARGUMENTS, columns_tokens_last, split_call, targets, warn_of_lost_start
from .write_sparsity import part_of_row


Inputs = dict[str, torch.Tensor]

# From the inputs of a chunk, its cache and its targets among them, to its loss and the model's outputs.
ComputeLoss = Callable[[dict], tuple[torch.Tensor, dict]]


# What the forward takes and a sequence has not: it says what to do with one call.
OF_A_CALL = ("past_key_values", "cache", "num_items_in_batch", "logits_to_keep", "tokens_last", "chunk_length")


def infini_module(model: nn.Module) -> Any:
    """The Infini-attention model inside of `model`, which may be wrapped by PEFT, DDP or torch.compile."""
    # By their classes, since wrappers have the attributes of what they wrap.
    found = next((module for module in model.modules() if hasattr(type(module), "new_cache")), None)
    if found is None:
        raise TypeError(
            f"{type(model).__name__} is no Infini-attention model, nor does it hold one: `infini convert` makes one."
        )
    return found


def refuse_adapters_of_calls(model: nn.Module) -> None:
    """Refuses methods of PEFT that look at where a call starts, of which a sequence in chunks or steps has several."""
    for module in model.modules():
        adapter = getattr(module, "active_peft_config", None)
        if getattr(adapter, "is_prompt_learning", False):
            raise ValueError(
                "Prompt learning adds tokens to each call of the model, so that those of a sequence read in chunks or "
                "over several steps would stand inside of it. Use another method of PEFT, or the stock Trainer."
            )
        if getattr(adapter, "alora_invocation_tokens", None) is not None:
            raise ValueError(
                "An activated LoRA looks for its invocation tokens in each call of the model, and adapts nothing of a "
                "chunk or step without them. Use a LoRA without alora_invocation_tokens, or the stock Trainer."
            )


def refuse_unread_inputs(module: nn.Module, inputs: Inputs) -> None:
    """Refuses what the forward of `module` takes as any keyword argument and does not read, be it a mask of tokens."""
    read = {*inspect.signature(module.forward).parameters, *TransformersKwargs.__annotations__, *PACKING_ARGUMENTS}
    read |= {"shift_labels", "return_dict"}
    for name, states in inputs.items():
        # The token types of a single text are 0.
        if name not in read and not (name == "token_type_ids" and not states.any()):
            raise ValueError(
                f"The model does not read {name}. What says where to learn belongs into labels, as -100 where nothing "
                "is to be learned; for a loss of your own, pass or override compute_loss."
            )


def has_own_loss(module: nn.Module) -> bool:
    """Whether the loss of `module` is another one than the sum over tokens that predict the next."""
    return module.loss_function is not ForCausalLMLoss


def chunk_lengths(
    length: int,
    chunk_segments: int | None,
    detach_segments: int | None,
    segment_length: int,
    cache: InfiniCache,
) -> list[list[int]]:
    """
    How `length` columns are cut: into windows of `detach_segments` segments, and these into chunks of
    `chunk_segments`; `None`: not at all. Cuts are where segments of the rows' streams end, if these stand at the same
    offset; the last chunk is longer by that offset at most. How many there are depends on `length` alone, so that
    processes which must run equally many need not talk about it.
    """
    window = length if detach_segments is None else detach_segments * segment_length
    chunk = window if chunk_segments is None else chunk_segments * segment_length
    offset = 0 if cache.tokens_read is None else int((cache.tokens_read % segment_length).max())
    lengths: list[list[int]] = []
    done = 0
    for start in range(0, length, window):
        end_of_window = min(start + window, length)
        lengths.append([])
        for end in (*range(start + chunk, end_of_window, chunk), end_of_window):
            end = end if end == length else end - offset
            lengths[-1].append(end - done)
            done = end
    return lengths


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


def prepared_inputs(inputs: Inputs) -> Inputs:
    """`inputs` with targets as `shift_labels`: the target of a chunk's last token is in the next chunk."""
    inputs = {name: states for name, states in inputs.items() if states is not None}
    of_call = [name for name in inputs if name in OF_A_CALL]
    if of_call:
        raise ValueError(
            f"{', '.join(of_call)} describes a call, not a sequence. Leave it out of the inputs; past_key_values and "
            "num_items_in_batch are arguments of their own."
        )
    if "labels" not in inputs and "shift_labels" not in inputs:
        raise ValueError("Training needs labels (or shift_labels, already moved one column to the left).")
    shape = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"].shape[:2]
    inputs["shift_labels"] = checked_targets(
        inputs.get("labels"), inputs.get("shift_labels"), inputs.get("attention_mask"), shape
    )
    return {"labels": labels_of(inputs["shift_labels"], inputs.get("attention_mask")), **inputs}


def backpropagate(
    model: nn.Module,
    inputs: Inputs,
    *,
    chunk_segments: int | None = None,
    detach_every_num_segments: int | None = None,
    past_key_values: InfiniCache | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    compute_loss: ComputeLoss | None = None,
    loss_inputs: Collection[str] = (),
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
    loss_scale: float = 1.0,
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[torch.Tensor, InfiniCache]:
    """
    Adds the gradients of the loss of a batch of sequences to the `.grad` of the parameters.

    Args:
        model: an [`InfiniForCausalLM`], or what wraps one.
        inputs: what its forward takes: `input_ids` `(B, T)`, `labels` (or `shift_labels`, aligned with the tokens that
            predict them), and if need be `attention_mask` and `position_ids`.
        chunk_segments: number of segments in a chunk; activations and logits of one chunk exist at a time, and each
            chunk but the last is run twice. `None`: the whole sequence is one chunk.
        detach_every_num_segments: back-propagation ends at every so many segments. `None`: at the first token.
        past_key_values: what the rows have read before, which no gradient flows to; it is left as it is.
        num_items_in_batch: what the sum of the tokens' losses is divided by. `None`: the number of targets.
        compute_loss: from the inputs of a chunk to its share in the loss and the model's outputs, as
            `Trainer.compute_loss` with `return_outputs=True`; the shares add up. `None`: the model's own loss.
        loss_inputs: names of inputs that `compute_loss` takes out and the model does not read, such as the states of
            a teacher: tensors `(B, T, ...)` are cut into chunks like labels.
        backward: what to call in place of `loss.backward()`, e.g. `accelerator.backward`.
        loss_scale: the factor that `backward` applies to a loss: of a gradient scaler, or 1 / gradient accumulation
            steps with `accelerator.backward`.
        no_sync: a context for all passes but the last, e.g. the `no_sync` of DDP.

    Returns:
        The loss, and the cache after the last token, to go on from.

    Raises:
        TypeError: if `model` holds no Infini-attention model.
        ValueError: if there are no labels, or they contradict `shift_labels`; if a number of segments is less than 1;
            if `model` learns prompts; if an input needs gradients, and there are several chunks; without
            `compute_loss`, if an input is one that the model does not read or the model's loss is not that of the
            next token. Rows that go on with what `past_key_values` have not read get a warning in the log.
    """
    for name, count in (("chunk_segments", chunk_segments), ("detach_every_num_segments", detach_every_num_segments)):
        if count is not None and count < 1:
            raise ValueError(f"{name}={count} must be at least 1.")
    inputs, cache, compute_loss = _start(model, inputs, past_key_values, num_items_in_batch, compute_loss)
    module = infini_module(model)
    segment_length, length = module.config.segment_length, inputs["shift_labels"].shape[1]
    part = partial(_part_of_row, module.get_input_embeddings(), length)
    windows = chunk_lengths(length, chunk_segments, detach_every_num_segments, segment_length, cache)
    lengths = [chunk for window in windows for chunk in window]
    need_gradients = [name for name, states in inputs.items() if torch.is_tensor(states) and states.requires_grad]
    if need_gradients and len(lengths) > 1:
        raise ValueError(
            f"{', '.join(need_gradients)} need gradients, which each chunk would send through what made them. Pass "
            "input_ids, detach them, or leave out chunk_segments and detach_every_num_segments."
        )
    chunks = iter(split_call(inputs, lengths, cache.tokens_read))
    losses = []
    for index, window in enumerate(windows):
        last_sync = nullcontext if index == len(windows) - 1 else no_sync
        loss, cache = _backpropagate_window(
            model,
            list(islice(chunks, len(window))),
            cache,
            compute_loss,
            backward,
            loss_scale,
            part,
            no_sync,
            last_sync,
            {"labels", "shift_labels", *loss_inputs},
        )
        losses.append(loss)
    return torch.stack(losses).sum(), cache


def _start(
    model: nn.Module,
    inputs: Inputs,
    past_key_values: InfiniCache | None,
    num_items_in_batch: torch.Tensor | int | None,
    compute_loss: ComputeLoss | None,
) -> tuple[Inputs, InfiniCache, ComputeLoss]:
    """The inputs with their targets, the cache to start from, and how the loss of a chunk is computed."""
    refuse_adapters_of_calls(model)
    inputs = prepared_inputs(inputs)
    module = infini_module(model)
    if compute_loss is None:
        if has_own_loss(module):
            raise ValueError(
                f"The loss of {type(module).__name__} is none of the next token, or one of your own, which need not "
                "add up over chunks: pass compute_loss, which does."
            )
        refuse_unread_inputs(module, inputs)
        compute_loss = _model_loss(model, inputs["shift_labels"], num_items_in_batch)
    cache = module.new_cache() if past_key_values is None else past_key_values.detached()
    if "position_ids" in inputs:
        length = inputs["shift_labels"].shape[1]
        warn_of_lost_start(inputs["position_ids"], inputs.get("attention_mask"), length, cache.tokens_read)
    return inputs, cache, compute_loss


def _model_loss(model: nn.Module, targets: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> ComputeLoss:
    """The model's own loss, divided by `num_items_in_batch`, or else by the number of `targets` `(B, T)`."""
    if num_items_in_batch is None:
        num_items_in_batch = (targets != -100).sum().clamp(min=1)

    def compute_loss(chunk: dict):
        outputs = model(**chunk, num_items_in_batch=num_items_in_batch)
        return outputs["loss"], outputs

    return compute_loss


def _backpropagate_window(
    model: nn.Module,
    chunks: list[Inputs],
    cache: InfiniCache,
    compute_loss: ComputeLoss,
    backward: Callable[[torch.Tensor], None],
    loss_scale: float,
    part: Callable[[int], AbstractContextManager],
    no_sync: Callable[[], AbstractContextManager],
    last_sync: Callable[[], AbstractContextManager],
    loss_inputs: Collection[str],
) -> tuple[torch.Tensor, InfiniCache]:
    """Goes forward over `chunks` from `cache` and back; only the pass over the first chunk runs in `last_sync`."""
    # DDP talks to the other processes in a forward, of which they may have fewer; the last passes alone are in step.
    reader = next((module.module for module in model.modules() if isinstance(module, DistributedDataParallel)), model)
    boundaries, random_states = [], []
    for index, chunk in enumerate(chunks):
        boundaries.append(cache.detached())
        random_states.append(_random_states(_devices(model, chunk)))
        if index < len(chunks) - 1:
            read = {name: states for name, states in chunk.items() if name not in loss_inputs}
            with torch.no_grad(), part(chunk["shift_labels"].shape[1]):
                reader(**read, past_key_values=cache, use_cache=False, logits_to_keep=1)

    losses: list[torch.Tensor] = []
    gradients: Inputs = {}
    final = None
    for index in reversed(range(len(chunks))):
        cache = boundaries.pop()
        leaves = {} if index == 0 else _require_grad(cache)
        is_rerun = index < len(chunks) - 1
        sync = last_sync if index == 0 else no_sync
        drawn = _random_states_from(random_states[index]) if is_rerun else nullcontext()
        with sync(), drawn, part(chunks[index]["shift_labels"].shape[1]):
            # The outputs are not kept: of all chunks, their logits would be the largest tensors.
            loss = compute_loss({**chunks[index], "past_key_values": cache, "use_cache": False})[0]
            states = cache.state_dict()
            # d(state . gradient) / d(state) = gradient, which `backward` has scaled once already.
            handed_on = [(states[name] * gradient).sum() for name, gradient in gradients.items()]
            backward(loss + sum(handed_on) / loss_scale if handed_on else loss)
        if final is None:
            final = cache.detached()
        losses.append(loss.detach())
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return torch.stack(losses).sum(), final


def _require_grad(cache: InfiniCache) -> Inputs:
    """Makes the states of a cache leaves of autograd."""
    states = {name: state for name, state in cache.state_dict().items() if state.is_floating_point()}
    for state in states.values():
        state.requires_grad_()
    return states


@torch.no_grad()
def loss_in_chunks(
    model: nn.Module,
    inputs: Inputs,
    *,
    chunk_segments: int | None = None,
    past_key_values: InfiniCache | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    compute_loss: ComputeLoss | None = None,
) -> Iterator[tuple[torch.Tensor, dict]]:
    """
    The loss of a batch of sequences without gradients, chunk by chunk; arguments as those of [`backpropagate`].

    Yields:
        The share of each chunk in the loss, and the model's outputs for it.
    """
    inputs, cache, compute_loss = _start(model, inputs, past_key_values, num_items_in_batch, compute_loss)
    module = infini_module(model)
    length = inputs["shift_labels"].shape[1]
    (lengths,) = chunk_lengths(length, chunk_segments, None, module.config.segment_length, cache)
    for chunk in split_call(inputs, lengths, cache.tokens_read):
        with _part_of_row(module.get_input_embeddings(), length, chunk["shift_labels"].shape[1]):
            share = compute_loss({**chunk, "past_key_values": cache, "use_cache": False})
        yield share


@contextmanager
def _part_of_row(embeddings: nn.Module, row_length: int, length: int) -> Iterator[None]:
    """
    A call of `length` columns as a part of a row: NEFTune divides its noise by the root of a call's length, and the
    penalty on writes is a mean over its tokens.
    """
    alpha = getattr(embeddings, "neftune_noise_alpha", None)
    with part_of_row(length / row_length):
        if alpha is None:
            yield
            return
        embeddings.neftune_noise_alpha = alpha * (length / row_length) ** 0.5
        try:
            yield
        finally:
            embeddings.neftune_noise_alpha = alpha


def _devices(model: nn.Module, inputs: Inputs) -> set[torch.device]:
    """Where `model` may draw random numbers: also where inputs are, since weights may be offloaded."""
    devices = {parameter.device for parameter in model.parameters()} | {inputs["shift_labels"].device}
    return {torch.device("cpu"), *(device for device in devices if device.type != "meta")}


def _random_states(devices: set[torch.device]) -> dict[torch.device, torch.Tensor]:
    """The states of the random generators of `devices`, which dropout draws from."""
    return {device: _generators(device).get_rng_state(*_place(device)) for device in devices}


@contextmanager
def _random_states_from(states: dict[torch.device, torch.Tensor]) -> Iterator[None]:
    """Draws from earlier states of the random generators, and goes on from the present ones afterwards."""
    present = _random_states(set(states))
    _set_random_states(states)
    try:
        yield
    finally:
        _set_random_states(present)


def _set_random_states(states: dict[torch.device, torch.Tensor]) -> None:
    for device, state in states.items():
        _generators(device).set_rng_state(state, *_place(device))


def _generators(device: torch.device) -> Any:
    return torch if device.type == "cpu" else torch.get_device_module(device)


def _place(device: torch.device) -> tuple[torch.device, ...]:
    """Which of several devices is meant, for those whose functions can be told."""
    return (device,) if device.type != "cpu" and _generators(device).device_count() > 1 else ()


__all__ = ["backpropagate", "loss_in_chunks"]
