"""What stands beside the weights of a checkpoint: tokenizer, generation configuration, licence."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER
from transformers.utils import logging

from .checkpoints import Checkpoint, read_json


logger = logging.get_logger(__name__)

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.*",
    "merges.txt",
    "special_tokens_map.json",
    "tokenization_*.py",
    "tokenizer.*",
    TOKENIZER_CONFIG,
    "vocab.*",
    "*.tiktoken",
)
LICENSE_FILES = ("LICENSE*", "NOTICE*")


def tokenizer_limit(checkpoint: Checkpoint) -> int | None:
    """The most tokens that the source's tokenizer takes without a warning; `None` if it does not say."""
    file = checkpoint.folder / TOKENIZER_CONFIG
    return read_json(file).get("model_max_length") if file.is_file() else None


def copy_tokenizer(checkpoint: Checkpoint, folder: Path, model_max_length: int | None) -> None:
    """
    Copies the source's tokenizer as it is, but for its limit; that of a GGUF file is converted.

    Args:
        model_max_length: the limit; `None` for none.
    """
    if checkpoint.options:
        _convert_tokenizer(checkpoint, folder, model_max_length)
        return
    if not _copy(checkpoint.folder, folder, TOKENIZER_FILES):
        logger.warning("The source has no tokenizer; the output has none.")
        return
    file = folder / TOKENIZER_CONFIG
    settings = read_json(file) if file.is_file() else {}
    settings.pop("model_max_length", None)
    if model_max_length is not None:
        settings["model_max_length"] = model_max_length
    # Else it would be chosen by the type of the model, which no longer tells.
    if tokenizer_class := TOKENIZER_MAPPING_NAMES.get(checkpoint.config_fields["model_type"]):
        settings.setdefault("tokenizer_class", tokenizer_class)
    write_json(file, settings)


def _convert_tokenizer(checkpoint: Checkpoint, folder: Path, model_max_length: int | None) -> None:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint.folder, **checkpoint.options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())
        logger.warning("The GGUF file has no tokenizer that can be converted; the output has none. (%s)", reason)
        return
    tokenizer.model_max_length = VERY_LARGE_INTEGER if model_max_length is None else model_max_length
    tokenizer.save_pretrained(folder)


def generation_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """The source's generation configuration, as its file has it."""
    file = checkpoint.folder / "generation_config.json"
    return read_json(file) if file.is_file() else GenerationConfig.from_model_config(checkpoint.config).to_diff_dict()


def copy_licence(checkpoint: Checkpoint, folder: Path) -> None:
    _copy(checkpoint.folder, folder, LICENSE_FILES)


def write_json(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy(source: Path, folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    files = [file for pattern in patterns for file in sorted(source.glob(pattern)) if file.is_file()]
    for file in files:
        shutil.copyfile(file, folder / file.name)
    return files
