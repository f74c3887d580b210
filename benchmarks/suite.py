"""What all sections of the benchmarks share: sizes, lengths and the contenders."""

from dataclasses import dataclass, field
from functools import partial

import torch

from .contenders import Contender, infini, llama, lucidrains, mistral
from .machine import Limits
from .report import Figure
from .timing import ratio


LINEAR = "Infini, segment, linear"
DELTA = "Infini, segment, delta"
SLIDING = "Infini, sliding, linear"
BFLOAT16 = "Infini, segment, linear, bfloat16"
KERNELS = "Infini, segment, linear, CPU kernels"
COMPILED = "Infini, segment, linear, CPU kernels, compiled"
ALL_HEADS = "Infini, all KV heads"
KERNELS_ALL_HEADS = "Infini, all KV heads, CPU kernels"
COMPILED_ALL_HEADS = "Infini, all KV heads, CPU kernels, compiled"
LLAMA = "Llama, full attention"
MISTRAL = "Mistral, sliding window"
LUCIDRAINS = "infini-transformer-pytorch"
KERNELS_LUCIDRAINS = "infini-transformer-pytorch, our CPU kernels"


@dataclass
class Suite:
    """
    Attributes:
        size: of all models; `all_heads_size`: with as many KV heads as heads, as infini-transformer-pytorch has.
        scale: what all lengths are divided by.
        repeats: rounds of the longest runs.
    """

    size: dict
    all_heads_size: dict
    segment_length: int
    scale: int
    repeats: int
    limits: Limits = field(default_factory=lambda: Limits(1.0, 1.0, 1.0))

    def length(self, tokens: int) -> int:
        return tokens // self.scale

    def ids(self, tokens: int) -> torch.Tensor:
        """`(1, tokens)`, the same ones each time."""
        return torch.randint(0, self.size["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(0))

    def contenders(self) -> dict[str, Contender]:
        """All that are compared, by the names of the plots' legends."""
        ours, all_heads = (
            partial(infini, size, segment_length=self.segment_length) for size in (self.size, self.all_heads_size)
        )
        theirs = partial(lucidrains, self.all_heads_size, self.segment_length)
        return {
            LINEAR: ours(),
            DELTA: ours(use_mem_delta_rule=True),
            SLIDING: ours(local_attention="sliding"),
            BFLOAT16: ours(torch.bfloat16),
            LLAMA: llama(self.size),
            MISTRAL: mistral(self.size, self.segment_length),
            KERNELS: ours(has_cpu_kernels=True),
            COMPILED: ours(has_cpu_kernels=True, compiles_steps=True),
            LUCIDRAINS: theirs(),
            KERNELS_LUCIDRAINS: theirs(has_cpu_kernels=True),
            # As infini-transformer-pytorch does it.
            ALL_HEADS: all_heads(detach_every_num_segments=2),
            KERNELS_ALL_HEADS: all_heads(has_cpu_kernels=True, detach_every_num_segments=2),
            COMPILED_ALL_HEADS: all_heads(has_cpu_kernels=True, compiles_steps=True),
        }


def against_lucidrains(title: str, seconds: dict[str, list[float]], aim: float = 1.5, note: str = "") -> list[Figure]:
    """How much faster ours are than infini-transformer-pytorch: as they are, with CPU kernels, and both with them."""
    compared = [
        ("", LUCIDRAINS, ALL_HEADS, aim),
        (", ours with CPU kernels", LUCIDRAINS, KERNELS_ALL_HEADS, aim),
        (", ours with CPU kernels and compiled", LUCIDRAINS, COMPILED_ALL_HEADS, aim),
        (", both with CPU kernels", KERNELS_LUCIDRAINS, KERNELS_ALL_HEADS, 1.0),
    ]
    return [
        Figure(
            f"{title} against infini-transformer-pytorch{how}", ratio(seconds[theirs], seconds[ours]), aim, note=note
        )
        for how, theirs, ours, aim in compared
        if ours in seconds
    ]
