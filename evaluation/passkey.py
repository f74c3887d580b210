"""The passkey task: a number is hidden in a long text, and asked for at the end."""

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .examples import Example, opening_ids
from .haystacks import Filler, encode, hide
from .wordings import PAPER_WORDING, Wording


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


def _set_off(text: str) -> str:
    """A text that comes after another: with a space before, if it does not bring white space of its own."""
    return text if text[:1].isspace() else f" {text}"


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
    answer = encode(tokenizer, wording.answer(key))
    end = torch.cat([encode(tokenizer, _set_off(wording.question)), answer])
    pieces = [(0.0, opening), (depth, encode(tokenizer, _set_off(wording.needle.format(key=key))))]
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


def passkey_text_example(
    tokenizer: PreTrainedTokenizerBase,
    filler: Filler,
    length: int,
    depth: float,
    generator: np.random.Generator,
    wording: Wording = PAPER_WORDING,
) -> Example:
    """
    The same as a user has it: the prompt ends where the question does, and is tokenized as one text.

    Returns:
        The answers are all tokens after the prompt: the space, unless the question ends in one, and the digits. The
        text has about `length` tokens: where pieces were joined, the tokenizer may find others.

    Raises:
        ValueError: if the words alone are longer.
    """
    example = passkey_example(tokenizer, filler, length, depth, generator, wording)
    answer = encode(tokenizer, wording.answer(example.facts["answer"]))
    text = str(tokenizer.decode(example.input_ids[: -len(answer)], skip_special_tokens=True)).removeprefix(" ")
    prompt = torch.cat([opening_ids(tokenizer), encode(tokenizer, text)])
    positions = torch.arange(len(prompt), len(prompt) + len(answer))
    return Example(torch.cat([prompt, answer]), positions, example.facts)
