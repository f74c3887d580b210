"""
The mathematics of the compressive memory of Infini-attention (arXiv 2404.07143, section 2.1), on plain tensors.

A memory is a matrix M `(..., key_dim, value_dim)` with a normaliser z `(..., key_dim)`. Keys and queries enter through
the feature map sigma(x) = elu(x) + 1 and carry no position.

    read    sigma(q) M / (sigma(q) . z)
    write   linear  M += sigma(K)^T V
            delta   M += sigma(K)^T (V - sigma(K) M / (sigma(K) . z))
            both    z += sum over the segment of sigma(K)

With a write strength beta per token (`learned_delta_update`), what is added to M is scaled by it, and z is not.
"""

from collections.abc import Callable
from functools import wraps

import torch


def without_autocast(function: Callable) -> Callable:
    """Runs `function` of tensors in their own dtype: a memory that is rounded at each write drifts."""

    @wraps(function)
    def wrapper(tensor: torch.Tensor, *args):
        if not torch.is_autocast_enabled(tensor.device.type):
            return function(tensor, *args)
        with torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *args)

    return wrapper


def feature_map(states: torch.Tensor) -> torch.Tensor:
    """sigma(x) = elu(x) + 1, as exp(min(x, 0)) + max(x, 0): for x << 0, elu(x) + 1 loses the digits of exp(x)."""
    return _FeatureMap.apply(states) if torch.is_grad_enabled() else _FeatureMap.forward(states)


class _FeatureMap(torch.autograd.Function):
    """With the gradient min(sigma(x), 1), for which autograd keeps only the features, as their products do anyway."""

    @staticmethod
    def forward(states: torch.Tensor) -> torch.Tensor:
        return states.clamp(max=0).exp_().add_(states.relu())

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: torch.Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (features,) = ctx.saved_tensors
        return gradient * features.clamp(max=1)


@without_autocast
def read_memory(features: torch.Tensor, memory: torch.Tensor, normaliser: torch.Tensor, eps: float) -> torch.Tensor:
    """
    sigma(q) M / (sigma(q) . z), with the denominator clamped at `eps`: an empty memory reads as 0.

    Args:
        features: sigma(q), `(..., length, key_dim)`.
        memory: M, `(..., key_dim, value_dim)`.
        normaliser: z, `(..., key_dim)`.

    Returns:
        `(..., length, value_dim)`.
    """
    # The reciprocal is of one column; a division would pass over all value dimensions three times more in backward.
    return (features @ memory) * (features @ normaliser.unsqueeze(-1)).clamp(min=eps).reciprocal()


@without_autocast
def segment_write(features: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What the linear rule adds to M and z: sigma(K)^T V and the sum of sigma(K).

    Args:
        features: sigma(K), `(..., length, key_dim)`, zero for what is not to be written.
        values: V, `(..., length, value_dim)`, scaled by their write strengths if there are any.

    Returns:
        `(..., key_dim, value_dim)` and `(..., key_dim)`.
    """
    return features.transpose(-1, -2) @ values, features.sum(-2)


@without_autocast
def delta_correction(
    features: torch.Tensor, normaliser: torch.Tensor, eps: float, write_strength: torch.Tensor | None = None
) -> torch.Tensor:
    """
    X = sigma(K)^T diag(beta / (sigma(K) . z)) sigma(K), with which the delta rule is affine in the memory:
    M + sigma(K)^T (beta V - beta sigma(K) M / (sigma(K) . z)) = M + sigma(K)^T (beta V) - X M.

    Zero where the memory is empty (z = 0): the first segment is written by the linear rule.

    Args:
        features: sigma(K), `(..., length, key_dim)`.
        normaliser: z from before the segment, `(..., key_dim)`.
        write_strength: beta, `(..., length, 1)`; `None` is 1.

    Returns:
        `(..., key_dim, key_dim)`.
    """
    retrieval_weight = (features @ normaliser.unsqueeze(-1)).clamp(min=eps).reciprocal()
    if write_strength is not None:
        retrieval_weight = retrieval_weight * write_strength
    is_written = (normaliser > 0).any(-1)[..., None, None]
    return features.transpose(-1, -2) @ (features * retrieval_weight.where(is_written, 0.0))


def exclusive_cumsum(start: torch.Tensor, increments: torch.Tensor) -> torch.Tensor:
    """
    The states before, between and after `increments`: start, start + increments[:, 0], ...

    Args:
        start: `(streams, ...)`.
        increments: `(streams, segments, ...)`.

    Returns:
        `(streams, segments + 1, ...)`.
    """
    return torch.cat([start.unsqueeze(1), increments], 1).cumsum(1)


@without_autocast
def apply_correction(correction: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """X M, what the delta rule takes from a memory; see [`delta_correction`]."""
    return correction @ memory


@without_autocast
def affine_scan(start: torch.Tensor, writes: torch.Tensor, corrections: torch.Tensor) -> torch.Tensor:
    """
    The states before, between and after M -> M + writes[:, s] - corrections[:, s] M.

    Args:
        start: `(streams, ..., key_dim, value_dim)`.
        writes: `(streams, segments, ..., key_dim, value_dim)`.
        corrections: `(streams, segments, ..., key_dim, key_dim)`.

    Returns:
        `(streams, segments + 1, ..., key_dim, value_dim)`.
    """
    states = [start]
    for write, correction in zip(writes.unbind(1), corrections.unbind(1)):
        states.append(states[-1] + write - correction @ states[-1])
    return torch.stack(states, 1)


def affine_prefixes(writes: torch.Tensor, corrections: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The scan of [`affine_scan`] for a start that is not known yet: start + memories[:, s] - totals[:, s] start.

    Args:
        writes: `(streams, segments, ..., key_dim, value_dim)`.
        corrections: `(streams, segments, ..., key_dim, key_dim)`.

    Returns:
        memories `(streams, segments + 1, ..., key_dim, value_dim)`, the states from an empty start; and totals
        `(streams, segments + 1, ..., key_dim, key_dim)`.
    """
    # I - totals is the product of all I - corrections so far, so that totals are a state with corrections for writes.
    both = torch.cat([writes, corrections], -1)
    states = affine_scan(torch.zeros_like(both[:, 0]), both, corrections)
    memories, totals = states.tensor_split([writes.shape[-1]], -1)
    return memories, totals
