"""The passkey task: a number is hidden in a long text, and asked for at the end."""

from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .examples import Example, opening_ids
from .haystacks import Filler, encode, hide


class Wording(NamedTuple):
    """What stands before the filler, how the number is hidden in it (`{key}`), and what stands after it."""

    opening: str
    needle: str
    question: str


_OPENING = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
# As in the appendix of arXiv 2404.07143.
PAPER_WORDING = Wording(
    _OPENING, "The pass key is {key}. Remember it. {key} is the pass key.", "What is the pass key? The pass key is"
)
TRAINING_WORDINGS = (
    PAPER_WORDING,
    Wording(
        "Somewhere below a secret code is given. You will be asked for it.",
        "The secret code is {key}. Do not forget it: {key}.",
        "Which secret code was given? The secret code is",
    ),
    Wording(
        "Read all of this, and keep the number of my room in mind.",
        "My room has the number {key}. Again, it is {key}.",
        "What number does my room have? My room has the number",
    ),
    Wording(
        "",
        "Please note that the ticket number is {key}. You will need {key} later.",
        "What is the ticket number? The ticket number is",
    ),
    Wording(
        "What follows is long, and one number in it matters.",
        "The number that matters is {key}. Yes, {key}.",
        "What is the number that matters? The number that matters is",
    ),
    Wording(
        "", "Write this down: to open the safe, dial {key}. I repeat, dial {key}.", "How is the safe opened? Dial"
    ),
)
# Not seen in training by the recipe of `examples/train_passkey.py`.
HELD_OUT_WORDINGS = (
    Wording(_OPENING, "The magic number is {key}. Keep {key} in memory.", "What is the magic number? It is"),
    Wording("", "Our account ends in {key}. That is {key}.", "What does our account end in? Our account ends in"),
    Wording("", "The password is {key}, so enter {key}.", "Which password is to be entered? Enter"),
)
# Sentences with numbers that nobody asks for.
DECOYS = (
    "There were {key} people in the city.",
    "He paid {key} dollars for it.",
    "The ship had sailed {key} miles.",
    "In all they counted {key} birds.",
    "It took {key} hours to read.",
    "The letter was dated {key}.",
)
NUM_DIGITS = 5
# Tokens between the number and a decoy near it, at most.
NEAR = 50


def draw_number(generator: np.random.Generator) -> str:
    """Any number of five digits."""
    return "".join(map(str, generator.integers(10, size=NUM_DIGITS)))


def passkey_example(
    tokenizer: PreTrainedTokenizerBase,
    filler: Filler,
    length: int,
    depth: float,
    generator: np.random.Generator,
    wording: Wording = PAPER_WORDING,
    num_decoys: int = 0,
    near_decoys: float = 0.0,
) -> Example:
    """
    A text of exactly `length` tokens, the answer included.

    Args:
        depth: of the number: 0 at the start of the filler, 1 at its end.
        num_decoys: number of sentences with other numbers.
        near_decoys: the probability of each to stand within 50 tokens of the number, and not anywhere.

    Returns:
        The answers are the tokens that have digits; `facts` are the depth and the answer.

    Raises:
        ValueError: if the words alone are longer.
    """
    key = draw_number(generator)
    opening = torch.cat([opening_ids(tokenizer), encode(tokenizer, wording.opening)])
    answer = encode(tokenizer, " " + key)
    end = torch.cat([encode(tokenizer, " " + wording.question), answer])
    pieces = [(0.0, opening), (depth, encode(tokenizer, " " + wording.needle.format(key=key)))]
    for _ in range(num_decoys):
        decoy = DECOYS[generator.integers(len(DECOYS))].format(key=draw_number(generator))
        decoy_depth = generator.random()
        if near_decoys > 0 and generator.random() < near_decoys:
            decoy_depth = min(1.0, max(0.0, depth + generator.uniform(-1, 1) * NEAR / length))
        pieces.append((decoy_depth, encode(tokenizer, " " + decoy)))
    ids = hide(filler, length, [*pieces, (1.0, end)], generator)
    has_digit = [any(map(str.isdigit, tokenizer.decode([token]))) for token in answer.tolist()]
    positions = torch.arange(length - len(answer), length)[torch.tensor(has_digit)]
    return Example(ids, positions, {"depth": depth, "answer": key})
