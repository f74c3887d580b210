"""What all sections of the benchmarks share: sizes, lengths and the contenders."""

from dataclasses import dataclass, field

import torch

from .contenders import Contender, infini, llama, lucidrains, mistral
from .machine import Limits


@dataclass
class Suite:
    """
    Attributes:
        size: of all models; `all_heads_size`: with as many KV heads as heads, as infini-transformer-pytorch has.
        scale: what all lengths are divided by.
        repeats: rounds of the longest runs.
        compiles: whether decoding is measured compiled, too.
    """

    size: dict
    all_heads_size: dict
    segment_length: int
    scale: int
    repeats: int
    compiles: bool = False
    limits: Limits = field(default_factory=lambda: Limits(1.0, 1.0))

    def length(self, tokens: int) -> int:
        return tokens // self.scale

    def ids(self, tokens: int) -> torch.Tensor:
        """`(1, tokens)`, the same ones each time."""
        return torch.randint(0, self.size["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(0))

    def infini(self, dtype: torch.dtype = torch.float32, **fields) -> Contender:
        return infini(self.size, dtype, segment_length=self.segment_length, **fields)

    def infini_all_heads(self) -> Contender:
        return infini(self.all_heads_size, segment_length=self.segment_length)

    def llama(self, dtype: torch.dtype = torch.float32) -> Contender:
        return llama(self.size, dtype)

    def mistral(self) -> Contender:
        return mistral(self.size, self.segment_length)

    def lucidrains(self) -> Contender:
        return lucidrains(self.all_heads_size, self.segment_length)
