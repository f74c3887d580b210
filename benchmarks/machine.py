"""The machine's limits, measured as the models meet them: products of their shapes, and passes over memory."""

from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from torch import nn

from examples.cpu_kernels import onednn_product

from .timing import clock_of


class Limits(NamedTuple):
    """
    `flops`: floating-point operations per second of the products of a layer, as PyTorch computes them; `kernel_flops`:
    the same with our CPU kernels; `bandwidth`: bytes read per second.
    """

    flops: float
    kernel_flops: float
    bandwidth: float


def _median_seconds(run: Callable, repeats: int, device: str) -> float:
    seconds, clock = [], clock_of(device)
    for _ in range(repeats + 1):
        start = clock()
        run()
        seconds.append(clock() - start)
    return median(seconds[1:])


def linear_shapes(size: dict) -> list[tuple[int, int]]:
    """Input and output width of each linear layer of a decoder layer."""
    width, inner = size["hidden_size"], size["intermediate_size"]
    key_width = width // size["num_attention_heads"] * size["num_key_value_heads"]
    return [
        (width, width),
        (width, key_width),
        (width, key_width),
        (width, width),
        *[(width, inner)] * 2,
        (inner, width),
    ]


def matmul_flops(
    size: dict,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    repeats: int = 20,
    product=nn.functional.linear,
    device: str = "cpu",
) -> float:
    """Operations per second of the linear layers of one decoder layer on `tokens` tokens, and of nothing else."""
    shapes = linear_shapes(size)
    inputs = {width: torch.randn(tokens, width, device=device).to(dtype) for width, _ in shapes}
    weights = [torch.randn(after, before, device=device).to(dtype) for before, after in shapes]

    def run() -> None:
        for weight in weights:
            product(inputs[weight.shape[1]], weight)

    return 2 * tokens * sum(before * after for before, after in shapes) / _median_seconds(run, repeats, device)


def read_bandwidth(nbytes: int = 2**29, repeats: int = 10, device: str = "cpu") -> float:
    """Bytes per second of a sum over an array that no cache holds."""
    numbers = torch.ones(nbytes // 4, device=device)
    return nbytes / _median_seconds(numbers.sum, repeats, device)


def copy_bandwidth(nbytes: int, device: str, repeats: int = 10) -> float:
    """Bytes per second, read and written, of a copy of an array."""
    numbers = torch.ones(nbytes // 4, device=device)
    copy = torch.empty_like(numbers)
    return 2 * nbytes / _median_seconds(lambda: copy.copy_(numbers), repeats, device)


def square_matmul_flops(width: int, dtype: torch.dtype, device: str, repeats: int = 20) -> float:
    """Operations per second of the product of two square matrices."""
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    return 2 * width**3 / _median_seconds(lambda: left @ right, repeats, device)


def measure(size: dict, tokens: int) -> Limits:
    """With products of up to so many tokens, whichever number is fastest."""
    flops, kernel_flops = (
        max(matmul_flops(size, tokens // part, product=product) for part in (1, 2, 4))
        for product in (nn.functional.linear, onednn_product)
    )
    return Limits(flops, kernel_flops, read_bandwidth())


def prefill_flops(size: dict, tokens: int, segment_length: int, local_attention: str, written: int = 0) -> float:
    """
    The operations that a prefill with the linear rule cannot do without: linear layers (but for the logits), local
    attention over what a token sees, and reading and writing the memory.

    Args:
        written: tokens of which the last layer computes only what it keeps: keys, values and what they write.
    """
    head_dim = size["hidden_size"] // size["num_attention_heads"]
    heads, kv_heads = size["num_attention_heads"], size["num_key_value_heads"]
    linear = 2 * sum(before * after for before, after in linear_shapes(size))
    seen = segment_length if local_attention == "sliding" else (segment_length + 1) / 2
    attention = 4 * heads * head_dim * seen
    memory = 2 * head_dim * head_dim * (heads + kv_heads)
    layer = linear + attention + memory
    write = 2 * kv_heads * head_dim * (2 * size["hidden_size"] + head_dim)
    return tokens * size["num_hidden_layers"] * layer - written * (layer - write)
