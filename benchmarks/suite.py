"""What all sections of the benchmarks share: sizes, lengths and the contenders."""

from dataclasses import dataclass, field
from functools import partial

import torch

from .contenders import Contender, infini, llama, lucidrains, mistral
from .machine import Limits


LINEAR = "Infini, segment, linear"
DELTA = "Infini, segment, delta"
SLIDING = "Infini, sliding, linear"
BFLOAT16 = "Infini, segment, linear, bfloat16"
COMPILED = "Infini, segment, linear, compiled"
ALL_HEADS = "Infini, all KV heads"
BY_INPUT_ALL_HEADS = "Infini, all KV heads, weights stored by input"
COMPILED_ALL_HEADS = "Infini, all KV heads, weights stored by input, compiled"
LLAMA = "Llama, full attention"
MISTRAL = "Mistral, sliding window"
LUCIDRAINS = "infini-transformer-pytorch"


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

    def contenders(self) -> dict[str, Contender]:
        """All that are compared, by the names of the plots' legends."""
        ours, all_heads = (
            partial(infini, size, segment_length=self.segment_length) for size in (self.size, self.all_heads_size)
        )
        contenders = {
            LINEAR: ours(),
            DELTA: ours(use_mem_delta_rule=True),
            SLIDING: ours(local_attention="sliding"),
            BFLOAT16: ours(torch.bfloat16),
            LLAMA: llama(self.size),
            MISTRAL: mistral(self.size, self.segment_length),
            LUCIDRAINS: lucidrains(self.all_heads_size, self.segment_length),
            # As infini-transformer-pytorch does it.
            ALL_HEADS: all_heads(detach_every_num_segments=2),
        }
        if self.compiles:
            contenders[COMPILED] = ours(compiles_steps=True)
            contenders[BY_INPUT_ALL_HEADS] = all_heads(stores_by_input=True)
            contenders[COMPILED_ALL_HEADS] = all_heads(stores_by_input=True, compiles_steps=True)
        return contenders
