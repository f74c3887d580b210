"""
What a model of 8 billion parameters would cost on H100s, predicted by a roofline: nothing here was run on a GPU.

    python -m benchmarks.scale        # prints the tables of docs/scale.md
"""

import argparse
from dataclasses import dataclass

import torch

from .contenders import key_value_nbytes
from .machine import linear_shapes, prefill_flops


# Llama 3.1 8B, and what a conversion of it would use.
SIZE = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
HEAD_DIM = SIZE["hidden_size"] // SIZE["num_attention_heads"]
SEGMENT_LENGTH = 2048
LENGTHS = (1_000_000, 10_000_000)


@dataclass(frozen=True)
class Device:
    """Per second: floating-point operations (dense bfloat16), bytes of its memory, bytes sent to its neighbours."""

    flops: float = 989e12
    bandwidth: float = 3.35e12
    link: float = 450e9
    nbytes: float = 80e9


@dataclass(frozen=True)
class Assumptions:
    """
    Attributes:
        matmul_share: of the device's peak that large products of matrices reach.
        model_share: of the rate of these products that a whole prefill reaches; measured by `python -m benchmarks`, on
            a CPU.
        attention_share: of the peak that a causal attention kernel reaches.
    """

    matmul_share: float = 0.7
    model_share: float = 0.65
    attention_share: float = 0.6


def weights_nbytes() -> float:
    linear = SIZE["num_hidden_layers"] * sum(before * after for before, after in linear_shapes(SIZE))
    return 2 * (linear + 2 * SIZE["vocab_size"] * SIZE["hidden_size"])


def state_nbytes() -> float:
    """Of one sequence, however long: float32 memories and what the open segment adds, a bfloat16 window."""
    of_memory = 2 * 4 * HEAD_DIM * (HEAD_DIM + 1)
    of_window = 2 * 2 * SEGMENT_LENGTH * HEAD_DIM
    return SIZE["num_hidden_layers"] * SIZE["num_key_value_heads"] * (of_memory + of_window)


def full_nbytes(tokens: int) -> float:
    """Of full attention's keys and values in bfloat16."""
    return key_value_nbytes(SIZE, tokens, torch.bfloat16)


def attention_flops(tokens: int) -> float:
    """Of full causal attention."""
    return SIZE["num_hidden_layers"] * 2 * SIZE["hidden_size"] * float(tokens) ** 2


def linear_flops(tokens: int) -> float:
    return 2.0 * tokens * SIZE["num_hidden_layers"] * sum(before * after for before, after in linear_shapes(SIZE))


def infini_prefill_seconds(tokens: int, device: Device, assumed: Assumptions, devices: int = 1) -> float:
    flops = prefill_flops(SIZE, tokens, SEGMENT_LENGTH, "sliding")
    return flops / devices / (device.flops * assumed.matmul_share * assumed.model_share)


def full_prefill_seconds(tokens: int, device: Device, assumed: Assumptions, devices: int = 1) -> float:
    linear = linear_flops(tokens) / (assumed.matmul_share * assumed.model_share)
    attention = attention_flops(tokens) / assumed.attention_share
    return (linear + attention) / devices / device.flops


def decode_seconds(kept_nbytes: float, device: Device, devices: int = 1) -> float:
    """A token of one sequence: weights and what is kept of the text are read once, each device its share."""
    return (weights_nbytes() + kept_nbytes) / devices / device.bandwidth


def exchanged_nbytes(devices: int) -> float:
    """
    What a rank of context parallelism takes in during a forward pass, by the table in docs/context_parallel.md: linear
    rule, sliding.
    """
    gathered = 4 * HEAD_DIM * (HEAD_DIM + 1) * (devices - 1)
    from_neighbour = 2 * 2 * SEGMENT_LENGTH * HEAD_DIM
    return SIZE["num_hidden_layers"] * SIZE["num_key_value_heads"] * (gathered + from_neighbour)


def ring_nbytes(tokens: int, devices: int) -> float:
    """What a rank of ring attention takes in: the keys and values of all others."""
    return full_nbytes(tokens) * (devices - 1) / devices


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{1e6 * seconds:.0f} µs"
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 600:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.3g} GB" if nbytes < 1e12 else f"{nbytes / 1e12:.2f} TB"


def fits(nbytes: float, device: Device, devices: int) -> str:
    return "fits" if nbytes + weights_nbytes() < devices * device.nbytes else "does not fit"


def table(device: Device, assumed: Assumptions) -> str:
    lines = [
        "| predicted, one sequence, bfloat16 | full attention | Infini-attention | ratio |",
        "|---|--:|--:|--:|",
    ]

    def row(name: str, full: float, ours: float, text, note: str = "") -> None:
        lines.append(f"| {name} | {text(full)}{note} | {text(ours)} | {full / ours:,.3g} |")

    for tokens in LENGTHS:
        kept = full_nbytes(tokens)
        millions = f"{tokens // 1_000_000}M tokens"
        row(f"{millions}: kept of the text", kept, state_nbytes(), gigabytes)
        for devices in (1, 8):
            where = "1 H100" if devices == 1 else "8 H100s"
            note = f" ({fits(kept, device, devices)})"
            row(
                f"{millions}, {where}: prefill",
                full_prefill_seconds(tokens, device, assumed, devices),
                infini_prefill_seconds(tokens, device, assumed, devices),
                duration,
                note,
            )
        row(
            f"{millions}, 8 H100s: taken in by a rank in a prefill (ring attention / context parallelism)",
            ring_nbytes(tokens, 8),
            exchanged_nbytes(8),
            gigabytes,
        )
        row(
            f"{millions}, 8 H100s: the same as time on the link",
            ring_nbytes(tokens, 8) / device.link,
            exchanged_nbytes(8) / device.link,
            duration,
        )
        for devices in (1, 8):
            where = "1 H100" if devices == 1 else "8 H100s, weights and state split"
            row(
                f"{millions}, {where}: a token",
                decode_seconds(kept, device, devices),
                decode_seconds(state_nbytes(), device, devices),
                duration,
                f" ({fits(kept, device, devices)})",
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print(table(Device(), Assumptions()))


if __name__ == "__main__":
    main()
