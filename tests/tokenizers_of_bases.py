"""Small tokenizers as base models have them, and folders of checkpoints with them."""

import json
from pathlib import Path
from typing import Any

from base_models import base_model
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE


TEXTS = ["hi there, the  house\nis é á 家 12", " hi hi ▁▁ the Don't "] * 5


def replacing_spaces() -> Tokenizer:
    """As Llama 2's and Mistral's tokenizer.json: bytes as a fallback, and a normalizer that puts "▁" before a text."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _as_sentencepiece(tokenizer)


def metaspace() -> Tokenizer:
    """The same by a pre-tokenizer, as later conversions write it: a special token in a text starts no new word."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    return _as_sentencepiece(tokenizer)


def _as_sentencepiece(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def byte_level() -> Tokenizer:
    """As Llama 3's and Qwen's, with a pattern that is neither's."""
    tokenizer = Tokenizer(BPE())
    words = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=350, special_tokens=special, initial_alphabet=alphabet)
    )
    return tokenizer


BACKENDS = {kind.__name__: kind() for kind in (replacing_spaces, metaspace, byte_level)}

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def save_base(folder: Path, variant: str = "llama", kind: str = "replacing_spaces", **settings: Any) -> Path:
    """A base model of one layer with a tokenizer.json of `kind` and a tokenizer_config.json of `settings`."""
    base_model(variant, num_hidden_layers=1).save_pretrained(folder)
    BACKENDS[kind].save(str(folder / "tokenizer.json"))
    # As transformers writes it.
    content = json.dumps({**SPECIAL_TOKENS, **settings}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(content, encoding="utf-8")
    return folder
