"""Variable tracking of RULER (arXiv 2404.06654): which variables hold a value, over several assignments."""

import string

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .examples import Example, opening_ids
from .haystacks import Filler, encode, hide


OPENING = "Memorize and track the chain(s) of variable assignment hidden in the following text."


def variable_tracking_example(
    tokenizer: PreTrainedTokenizerBase,
    filler: Filler,
    length: int,
    generator: np.random.Generator,
    num_hops: int = 4,
    num_chains: int = 1,
) -> Example:
    """
    Chains `VAR A = 12345`, `VAR B = VAR A`, ... of `num_hops` assignments after the first, hidden in filler in their
    order; the variables of the first chain are asked for at the end.

    Returns:
        The answers are the tokens of the variables' names, as the prompt lists them; `facts` are the names.

    Raises:
        ValueError: if the words alone are longer than `length`.
    """
    names = _draw_names(generator, num_chains * (num_hops + 1))
    chains = [names[start : start + num_hops + 1] for start in range(0, len(names), num_hops + 1)]
    values = [f"{value:05}" for value in generator.choice(10**5, num_chains, replace=False)]
    opening = torch.cat([opening_ids(tokenizer), encode(tokenizer, OPENING)])
    pieces = [(0.0, opening)]
    for chain, value in zip(chains, values):
        sources = [value, *(f"VAR {name}" for name in chain)]
        depths = np.sort(generator.random(len(chain)))
        pieces += [
            (depth, encode(tokenizer, f" VAR {name} = {source}."))
            for depth, name, source in zip(depths, chain, sources)
        ]
    question = (
        f" Question: Find all variables that are assigned the value {values[0]} in the text above. Answer: According "
        f"to the chain(s) of variable assignment in the text above, {len(chains[0])} variables are assigned the value "
        f"{values[0]}, they are:"
    )
    answer = encode(tokenizer, "".join(f" {name}" for name in chains[0]))
    pieces.append((1.0, torch.cat([encode(tokenizer, question), answer])))
    ids = hide(filler, length, pieces, generator)
    return Example(ids, torch.arange(length - len(answer), length), {"answer": " ".join(chains[0])})


def _draw_names(generator: np.random.Generator, count: int) -> list[str]:
    """Different names of five capitals."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(generator.choice(list(string.ascii_uppercase), 5))] = None
    return list(names)
