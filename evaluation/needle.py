"""A needle in a haystack (Kamradt's test): a sentence that has nothing to do with the text around it, asked for."""

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .examples import Example, opening_ids
from .haystacks import Filler, encode, hide


CITIES = ("San Francisco", "Lisbon", "Nairobi", "Kyoto", "Montreal", "Oslo", "Lima", "Prague", "Hanoi", "Adelaide")
DEEDS = ("paint", "count", "buy", "admire", "carry", "draw", "polish", "photograph")
KINDS = ("wooden", "golden", "broken", "purple", "ancient", "tiny", "Italian", "striped")
THINGS = ("boats", "lamps", "horses", "hats", "kites", "bells", "drums", "windows")


def needle_example(
    tokenizer: PreTrainedTokenizerBase,
    filler: Filler,
    length: int,
    depth: float,
    generator: np.random.Generator,
) -> Example:
    """
    What there is to do in a city, one of 512 things, hidden at a depth and asked for at the end.

    Returns:
        The answers are the tokens of the activity; `facts` are the depth and the activity.

    Raises:
        ValueError: if the words alone are longer than `length`.
    """
    city, *words = (words[generator.integers(len(words))] for words in (CITIES, DEEDS, KINDS, THINGS))
    activity = " ".join(words)
    thing = f"The best thing to do in {city} is to"
    answer = encode(tokenizer, f" {activity}")
    needle = encode(tokenizer, f" {thing} {activity}.")
    end = torch.cat([encode(tokenizer, f" What is the best thing to do in {city}? {thing}"), answer])
    ids = hide(filler, length, [(0.0, opening_ids(tokenizer)), (depth, needle), (1.0, end)], generator)
    return Example(ids, torch.arange(length - len(answer), length), {"depth": depth, "answer": activity})
