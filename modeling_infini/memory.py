"""
The mathematics of the compressive memory of Infini-attention (arXiv 2404.07143, section 2.1), on plain tensors.

A memory is a matrix M `(..., key_dim, value_dim)` with a normaliser z `(..., key_dim)`. Keys and queries enter through
a feature map and carry no position: sigma(x) = elu(x) + 1, or, of log-features that a learned map gives, exp(x).

    read    sigma(q) M / (sigma(q) . z)
    write   linear  M += sigma(K)^T V
            delta   M += sigma(K)^T (V - sigma(K) M / (sigma(K) . z))
            both    z += sum over the segment of sigma(K)

With a write strength beta per token, what is added to M is scaled by it, and z is not.
"""

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import torch
from transformers.utils.generic import maybe_autocast


class MemoryState(NamedTuple):
    """M `(..., key_dim, value_dim)` and z `(..., key_dim)`."""

    matrix: torch.Tensor
    normaliser: torch.Tensor


def memory_dtype(dtype: torch.dtype) -> torch.dtype:
    """M and z are float32 even where the model is not; float64 in a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(function: Callable) -> Callable:
    """Runs `function` of tensors in their own dtype: a memory that is rounded at each write drifts."""

    @wraps(function)
    def wrapper(tensor: torch.Tensor, *args):
        with maybe_autocast(tensor.device.type, enabled=False):
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


FEATURE_MAPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"elu": feature_map, "exp": torch.exp}


@without_autocast
def log_features(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """
    u and -u side by side, with u = W x + b of each head: logarithms of the features of Hedgehog (arXiv 2402.04347).

    The sum of exp(u_q + u_k) and exp(-u_q - u_k) is never below 2, so that no denominator of a read gets small.

    Args:
        states: x, `(..., heads, head_dim)`.
        weight, bias: W `(heads, head_dim, head_dim)` and b `(heads, head_dim)`.

    Returns:
        `(..., heads, 2 head_dim)`, between -20 and 20: sums of their products over millions of tokens are finite.
    """
    dtype = memory_dtype(weight.dtype)
    mapped = torch.einsum("...hj,hij->...hi", states.to(dtype), weight.to(dtype)) + bias
    mapped = mapped.clamp(-20, 20)
    return torch.cat([mapped, -mapped], -1)


@without_autocast
def read_memory(features: torch.Tensor, memory: MemoryState, eps: float) -> torch.Tensor:
    """
    sigma(q) M / (sigma(q) . z), with the denominator clamped at `eps`: an empty memory reads as 0.

    Args:
        features: sigma(q), `(..., length, key_dim)`.

    Returns:
        `(..., length, value_dim)`.
    """
    # The reciprocal is of one column; a division would pass over all value dimensions three times more in backward.
    return (features @ memory.matrix) * (features @ memory.normaliser.unsqueeze(-1)).clamp(min=eps).reciprocal()


@without_autocast
def linear_write(features: torch.Tensor, values: torch.Tensor) -> MemoryState:
    """
    What the linear rule adds to M and z: sigma(K)^T V and the sum of sigma(K).

    Args:
        features: sigma(K), `(..., length, key_dim)`, zero for what is not to be written.
        values: V, `(..., length, value_dim)`, scaled by their write strengths if there are any.
    """
    return MemoryState(features.transpose(-1, -2) @ values, features.sum(-2))


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


@without_autocast
def apply_correction(correction: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """X M, what the delta rule takes from a memory; see [`delta_correction`]."""
    return correction @ matrix


@without_autocast
def scan(start: torch.Tensor, writes: torch.Tensor, corrections: torch.Tensor | None = None) -> torch.Tensor:
    """
    The states before, between and after S segments, each of which maps M to M + writes[:, s] - corrections[:, s] M.

    Args:
        start: `(streams, ..., key_dim, value_dim)`; without corrections of any shape `(streams, ...)`.
        writes: `(streams, S, ...)`.
        corrections: `(streams, S, ..., key_dim, key_dim)`; `None`: the linear rule, and z.

    Returns:
        `(streams, S + 1, ...)`.
    """
    if corrections is None:
        return torch.cat([start.unsqueeze(1), writes], 1).cumsum(1)
    states = [start]
    for write, correction in zip(writes.unbind(1), corrections.unbind(1)):
        states.append(states[-1] + write - correction @ states[-1])
    return torch.stack(states, 1)


def write_token(
    features: torch.Tensor, values: torch.Tensor, pending: MemoryState, write_strength: torch.Tensor | None
) -> MemoryState:
    """
    What an open segment will add to M and z, with one more token: an update of rank one.

    Args:
        features: sigma(k), `(..., 1, key_dim)`, zero for what is not to be written.
        values: v, `(..., 1, value_dim)`; with the delta rule, less what the memory returns for k.
        write_strength: beta, `(..., 1, 1)`; `None` is 1.
    """
    values = values if write_strength is None else values * write_strength
    return MemoryState(pending.matrix + features.transpose(-1, -2) * values, pending.normaliser + features.squeeze(-2))
