"""Filler of any length, and things hidden in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .resources import king_james_bible


# Of Landmark Attention (arXiv 2305.16300), as the paper's passkey task has it.
REPEATED_SENTENCE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Ids of a text, `(tokens,)`, without special tokens."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.long)


class Filler(NamedTuple):
    """
    What things are hidden in.

    Attributes:
        name: for tables.
        ids: `(tokens,)`; after the last token comes the first again.
    """

    name: str
    ids: torch.Tensor

    def passage(self, start: int, length: int) -> torch.Tensor:
        """`(length,)`, from token `start` on."""
        start %= len(self.ids)
        repeats = -(-(start + length) // len(self.ids))
        return self.ids.repeat(repeats)[start : start + length] if repeats > 1 else self.ids[start : start + length]


def repeated_sentence(tokenizer: PreTrainedTokenizerBase) -> Filler:
    return Filler("repeated sentence", encode(tokenizer, " " + REPEATED_SENTENCE))


def text_filler(tokenizer: PreTrainedTokenizerBase, name: str, text: str) -> Filler:
    """
    Filler of a real text, with white space as single spaces.

    Raises:
        ValueError: if there is no text.
    """
    ids = encode(tokenizer, " " + " ".join(text.split()))
    if not text.strip():
        raise ValueError(f"{name} holds no text to hide things in.")
    return Filler(name, ids)


def find_filler(tokenizer: PreTrainedTokenizerBase, name: str) -> Filler:
    """
    Filler by its name on the command line: `sentence`, `bible` or a text file.

    Raises:
        FileNotFoundError: if it is none of them.
    """
    if name == "sentence":
        return repeated_sentence(tokenizer)
    if name == "bible":
        return text_filler(tokenizer, "King James Bible", king_james_bible())
    file = Path(name)
    if not file.is_file():
        raise FileNotFoundError(f'The filler "{name}" is neither "sentence" nor "bible" nor a text file.')
    return text_filler(tokenizer, file.stem, file.read_text(encoding="utf-8"))


def hide(
    filler: Filler,
    length: int,
    pieces: Sequence[tuple[float, torch.Tensor]],
    generator: np.random.Generator,
) -> torch.Tensor:
    """
    A passage of filler that starts anywhere, with pieces in it.

    Args:
        length: number of tokens in all.
        pieces: depth and ids of each: at depth 0 all filler stands after it, at depth 1 before it. Of pieces at the
            same depth, what is first here is first there.

    Returns:
        `(length,)`.

    Raises:
        ValueError: if the pieces alone are longer, or a depth is not between 0 and 1.
    """
    if any(not 0 <= depth <= 1 for depth, _ in pieces):
        raise ValueError(f"Depths are between 0 and 1, not {', '.join(f'{depth:g}' for depth, _ in pieces)}.")
    pieces = sorted(pieces, key=lambda piece: piece[0])
    room = length - sum(len(ids) for _, ids in pieces)
    if room < 0:
        raise ValueError(f"What is hidden and asked for takes {length - room} tokens: {length} are too few.")
    passage = filler.passage(int(generator.integers(len(filler.ids))), room)
    cuts = [round(depth * room) for depth, _ in pieces]
    parts = list(passage.tensor_split(cuts))
    hidden = [part for filled, (_, ids) in zip(parts, pieces) for part in (filled, ids)]
    return torch.cat([*hidden, parts[-1]])
