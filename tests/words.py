"""A tokenizer of words for the tiny models, and texts of them."""

from pathlib import Path

from tiny import VOCABULARY, random_ids
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast


WORDS = [f"w{index}" for index in range(VOCABULARY)]


def save_word_tokenizer(folder: Path, **special_tokens: str) -> None:
    """Saves a tokenizer whose tokens are `WORDS`, in which all other words are the first."""
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, WORDS[0]))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=WORDS[0], **special_tokens).save_pretrained(folder)


def random_text(words: int, seed: int = 0) -> str:
    return " ".join(WORDS[index] for index in random_ids(words, seed=seed).tolist())
