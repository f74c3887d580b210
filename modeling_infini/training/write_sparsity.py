"""A pressure on write gates in training: of a long text, most is not worth remembering."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..modeling_infini import InfiniAttention, log_write_gates


class _AddLoss(torch.autograd.Function):
    """
    A tensor as it is, in whose backward a loss takes part: as the auxiliary losses of mixtures of experts are added,
    so that no trainer, loss function or chunk needs to know of it.
    """

    @staticmethod
    def forward(ctx, states: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return states.view_as(states)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return gradient, gradient.new_ones(())


# How much of a row the present call is. Not by thread: a layer that is checkpointed runs again in one of autograd's.
_share_of_row = 1.0


@contextmanager
def part_of_row(share: float) -> Iterator[None]:
    """Inside, a call is so much of a row, which a penalty that is a mean over a call's tokens has to know."""
    global _share_of_row
    _share_of_row = share
    try:
        yield
    finally:
        _share_of_row = 1.0


def write_penalty(log_gates: torch.Tensor, margin: float) -> torch.Tensor:
    """
    How far tokens are, on average, from weighing exp(-margin) of the one of their row and head that is remembered
    best: the mean of max(0, log g - max log g + margin). No label of what is worth remembering is used. A row counts
    whole, padding and packed documents included.

    Args:
        log_gates: log g, `(batch, length, kv_heads)`.
    """
    return torch.relu(log_gates - log_gates.amax(1, keepdim=True) + margin).mean()


@contextmanager
def sparse_writes(model: nn.Module, weight: float, margin: float = 20.0) -> Iterator[None]:
    """
    Inside, each call of a model in training adds `weight` times the [`write_penalty`] of each layer to its gradients,
    whatever the trainer. What is accumulated over batches adds it once for each of them, and scales of the loss, such
    as mixed precision's in float16, do not apply to it. What is read in chunks adds of each chunk its share of the
    row, so that a token weighs as much as in one pass; the best of its row is then that of its chunk. With context
    parallelism, each rank adds the penalty of its own piece.

    A loss alone stops to teach what not to write once filler is a small share of what is read at the lengths trained
    on. The penalty goes on, and a memory that has learned on short texts holds on longer ones.

    Args:
        weight: of the penalty, against a loss in nats.
        margin: in nats; 20 is a weight of 2e-9, of which a million are 0.002.

    Raises:
        TypeError: if the model has no write gates.
        ValueError: if `weight` or `margin` is negative.
    """
    if not (weight >= 0 and margin >= 0):
        raise ValueError(f"weight={weight} and margin={margin} must not be negative: nothing is to be written more.")
    layers = [module for module in model.modules() if isinstance(module, InfiniAttention) and module.has_memory]
    # What wraps them included, as PEFT does.
    gates = [layer.memory.write_gate for layer in layers if layer.config.memory_write_gate]
    if not layers:
        raise TypeError("The model has no layer with a memory (memory_layers=[]): nothing is written.")
    if not gates:
        raise TypeError("The model has no write gates: make it with memory_write_gate=True.")

    def add_penalty(gate: Any, arguments: tuple, logits: torch.Tensor) -> torch.Tensor:
        if not (gate.training and logits.requires_grad):
            return logits
        log_gates = log_write_gates(logits)
        # With tensor parallelism, this process has some of the heads that the mean is over.
        share_of_heads = log_gates.shape[-1] / gate.out_features
        share = _share_of_row * share_of_heads
        return _AddLoss.apply(logits, share * weight * write_penalty(log_gates, margin))

    # Code that is compiled already does not look for hooks; it is compiled anew.
    torch.compiler.reset()
    with ExitStack() as hooks:
        for gate in gates:
            hooks.callback(gate.register_forward_hook(add_penalty).remove)
        yield


__all__ = ["sparse_writes", "write_penalty"]
