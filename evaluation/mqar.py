"""Multi-query associative recall (MQAR, arXiv 2312.04927): pairs of tokens, and later their keys again."""

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .examples import Example, opening_ids
from .haystacks import Filler, hide


def mqar_example(
    tokenizer: PreTrainedTokenizerBase,
    filler: Filler,
    length: int,
    generator: np.random.Generator,
    num_pairs: int = 8,
) -> Example:
    """
    `num_pairs` pairs of a key and a value, filler, and each key once more, in any order, with its value after it.
    Keys and values are any tokens but the special ones and those of the filler; no token stands for two of them.

    Returns:
        The answers are the values at the end.

    Raises:
        ValueError: if the pairs do not fit into `length` twice, or the filler leaves too few tokens for them.
    """
    taken = {*tokenizer.all_special_ids, *filler.ids.unique().tolist()}
    tokens = np.array([token for token in range(len(tokenizer)) if token not in taken])
    if len(tokens) < 2 * num_pairs:
        raise ValueError(
            f"{num_pairs} pairs need {2 * num_pairs} tokens that the filler has not; there are {len(tokens)}: take a "
            "filler of fewer words, like the repeated sentence."
        )
    pairs = torch.from_numpy(generator.choice(tokens, (num_pairs, 2), replace=False))
    asked = pairs[torch.from_numpy(generator.permutation(num_pairs))]
    opening = torch.cat([opening_ids(tokenizer), pairs.flatten()])
    ids = hide(filler, length, [(0.0, opening), (1.0, asked.flatten())], generator)
    return Example(ids, torch.arange(length - asked.numel() + 1, length, 2), {})
