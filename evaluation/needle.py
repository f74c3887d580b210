"""
Needles in a haystack: a sentence that has nothing to do with the text around it, asked for (Kamradt's test), alone or
among others of its form, so that it is not found by being the odd one out (the multi-key needles of RULER,
arXiv 2404.06654).
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .examples import Example, opening_ids
from .haystacks import Filler, encode, hide


CITIES = ("San Francisco", "Lisbon", "Nairobi", "Kyoto", "Montreal", "Oslo", "Lima", "Prague", "Hanoi", "Adelaide")
DEEDS = ("paint", "count", "buy", "admire", "carry", "draw", "polish", "photograph")
KINDS = ("wooden", "golden", "broken", "purple", "ancient", "tiny", "Italian", "striped")
THINGS = ("boats", "lamps", "horses", "hats", "kites", "bells", "drums", "windows")
# Other needles among which one is asked for.
NUM_DECOYS = 7


def needle_example(
    tokenizer: PreTrainedTokenizerBase,
    filler: Filler,
    length: int,
    depth: float,
    generator: np.random.Generator,
    num_decoys: int = 0,
) -> Example:
    """
    What there is to do in a city, one of 512 things, hidden at a depth and asked for at the end.

    Args:
        num_decoys: number of other cities of which the same is said, something else for each, anywhere.

    Returns:
        The answers are the tokens of the activity; `facts` are the depth and the activity.

    Raises:
        ValueError: if the words alone are longer than `length`, or there are not so many cities.
    """
    first = str(CITIES[generator.integers(len(CITIES))])
    activities = [_activity(generator)]
    cities = _others(first, num_decoys, generator)
    while len(activities) < len(cities):
        if (activity := _activity(generator)) not in activities:
            activities.append(activity)
    thing = "The best thing to do in {city} is to"
    needles = [f" {thing.format(city=city)} {activity}." for city, activity in zip(cities, activities)]
    question = f" What is the best thing to do in {first}? {thing.format(city=first)}"
    return _among_others(tokenizer, filler, length, depth, generator, needles, question, activities[0])


def number_example(
    tokenizer: PreTrainedTokenizerBase,
    filler: Filler,
    length: int,
    depth: float,
    generator: np.random.Generator,
    num_decoys: int = NUM_DECOYS,
) -> Example:
    """The same for a city's magic number of five digits, among the numbers of other cities."""
    cities = _others(str(generator.choice(CITIES)), num_decoys, generator)
    numbers = [f"{number:05}" for number in generator.choice(10**5, len(cities), replace=False)]
    number = "The magic number of {city} is"
    needles = [f" {number.format(city=city)} {value}." for city, value in zip(cities, numbers)]
    question = f" What is the magic number of {cities[0]}? {number.format(city=cities[0])}"
    return _among_others(tokenizer, filler, length, depth, generator, needles, question, numbers[0])


def _activity(generator: np.random.Generator) -> str:
    return " ".join(words[generator.integers(len(words))] for words in (DEEDS, KINDS, THINGS))


def _others(city: str, count: int, generator: np.random.Generator) -> list[str]:
    """A city, and `count` others after it."""
    if count >= len(CITIES):
        raise ValueError(f"num_decoys={count} must be less than the number of cities, {len(CITIES)}.")
    others = [other for other in CITIES if other != city]
    # Without others, nothing is drawn: trials are what they were before there were any.
    return [city, *(generator.choice(others, count, replace=False).tolist() if count else ())]


def _among_others(
    tokenizer: PreTrainedTokenizerBase,
    filler: Filler,
    length: int,
    depth: float,
    generator: np.random.Generator,
    needles: Sequence[str],
    question: str,
    answer: str,
) -> Example:
    """The first of `needles` at a depth, the others anywhere; the question and its answer at the end."""
    asked = encode(tokenizer, f" {answer}")
    depths = [depth, *(generator.random() for _ in needles[1:])]
    hidden = [(place, encode(tokenizer, needle)) for place, needle in zip(depths, needles)]
    end = torch.cat([encode(tokenizer, question), asked])
    ids = hide(filler, length, [(0.0, opening_ids(tokenizer)), *hidden, (1.0, end)], generator)
    has_digit = [any(map(str.isdigit, tokenizer.decode([token]))) for token in asked.tolist()]
    positions = torch.arange(length - len(asked), length)
    # Some tokenizers begin a number with a token of its space, which nobody has to remember.
    positions = positions[torch.tensor(has_digit)] if answer.isdigit() else positions
    return Example(ids, positions, {"depth": depth, "answer": answer})
