"""What a task of recall is made of: a text that holds its own answers, and where they stand."""

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase


class Example(NamedTuple):
    """
    One trial of a task.

    Attributes:
        input_ids: `(length,)`, the prompt with the answers in it.
        answer_positions: `(answers,)`, in order: where the tokens stand that a model has to find. Each is asked for
            given all before it, answers included. Where they follow one another at the end, all are found if and only
            if greedy generation from the text before the first finds them.
        facts: what a table groups by, or a reader wants to know: the depth, the answer as text.
    """

    input_ids: torch.Tensor
    answer_positions: torch.Tensor
    facts: dict[str, Any]


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """What a tokenizer puts before every text, its BOS token or nothing: `(tokens,)`. What it puts after it is not."""
    whole, content = (tokenizer("a", add_special_tokens=added, verbose=False).input_ids for added in (True, False))
    places = [place for place in range(len(whole)) if content and whole[place : place + len(content)] == content]
    return torch.tensor(whole[: places[0]] if places else tokenizer("", verbose=False).input_ids, dtype=torch.long)
