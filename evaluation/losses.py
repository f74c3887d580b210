"""Losses of the tokens of a long document: streamed, in windows, and with the memory shut out."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel


# Is told the number of tokens scored since the last call.
Progress = Callable[[int], object]


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`logits` `(tokens, vocabulary)`, `targets` `(tokens,)` -> `(tokens,)`, at least in float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits, targets.to(logits.device), reduction="none").cpu()


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
    cache, losses = None, []
    inputs, targets = input_ids[:, :-1], input_ids[0, 1:]
    for chunk, chunk_targets in zip(inputs.split(chunk_length, 1), targets.split(chunk_length)):
        outputs = model(chunk.to(model.device), past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        losses.append(_losses(outputs.logits[0], chunk_targets))
        if progress is not None:
            progress(len(chunk_targets))
    return torch.cat(losses)


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
    longest = model.config.max_position_embeddings
    if not 2 <= window <= longest:
        raise ValueError(f"window={window} must be at least 2 and at most max_position_embeddings={longest}.")
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
def memory_off(model: nn.Module) -> Iterator[None]:
    """
    Shuts the memory out: inside, the gates of an Infini-attention model give local attention a share of exactly 1.

    The weights are not touched. A hook replaces what each gate returns, whatever its scale and dtype, also where PEFT
    has wrapped the model or the gates; large weights would do the same only where the scale is positive and
    the sigmoid rounds to 1 (logits from 17 in float32, from 37 in float64). `lerp(read, local, 1)` is then `local` bit
    for bit. A model compiled before does not see the hooks.

    Raises:
        TypeError: if the model has no gates.
    """
    gates: list[Any] = [module.head_gates for module in model.modules() if hasattr(module, "head_gates")]
    if not gates:
        raise TypeError(f"{type(model).__name__} has no memory to shut out: it is no Infini-attention model.")
    with ExitStack() as hooks:
        for gate in gates:
            handle = gate.register_forward_hook(lambda module, arguments, share: torch.ones_like(share))
            hooks.callback(handle.remove)
        yield
