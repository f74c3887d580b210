"""What stands beside the weights: each file and field is kept, translated or refused, or left out by a warning."""

import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, logging

from modeling_infini import InfiniConfig, configuration_infini
from modeling_infini.modeling_infini import require_place

from .architectures import CACHE_FIELDS
from .checkpoints import LARGEST_SIDE_FILE, Checkpoint, is_hidden, is_weight_file, read_json, write_json


logger = logging.get_logger(__name__)

TOKENIZER_CONFIG = "tokenizer_config.json"
CARD = "README.md"
# Where the source's own card waits for the way back.
SOURCE_CARD = "README.source.md"

# Written anew by each conversion.
TRANSLATED_FILES = (CONFIG_NAME, GENERATION_CONFIG_NAME, TOKENIZER_CONFIG, CARD, SOURCE_CARD)

# A source without any of these has no tokenizer, whatever class may be made of nothing.
TOKENIZER_FILES = (
    TOKENIZER_CONFIG,
    "tokenizer.*",
    "vocab*",
    "tekken*.json",
    "*.model",
    "*.tiktoken",
    "tokenization_*.py",
)

# Code that takes the place of `generate()` where remote code is trusted, written for the source's cache.
CUSTOM_GENERATE = "custom_generate"

# The most tokens that a tokenizer takes without a warning, by its present name and its old one.
LIMIT_FIELDS = ("model_max_length", "max_len")

# How many tokens are proposed to the model, which takes back what it does not accept.
PROPOSAL_FIELDS = ("prompt_lookup_num_tokens", "num_assistant_tokens")
NUM_ASSISTANT_TOKENS = GenerationConfig._get_default_generation_params()["num_assistant_tokens"]

# Where tokenizers part: spaces at either end, lines, digits, accents, bytes, and their own signs for spaces.
HARD_TEXTS = (
    "",
    " ",
    " a",
    "  a  b ",
    "a\n\n b\t",
    "Don't 1234567",
    "helloWorld HTTPServer",
    "e\u0301 \u00e9 \uff46",
    "家\u200d😀",
    "▁a Ġa",
    "<s> a</s>",
)


def copy_files(checkpoint: Checkpoint, folder: Path, back: bool = False) -> None:
    """
    Copies the source's files and sub-folders, but for those that a conversion writes anew. A warning names what is
    left out. What stands beside a GGUF file may belong to another model: nothing of it is copied.

    Args:
        back: from Infini-attention: card and code files stay behind, and the card of the first source returns.

    Raises:
        ValueError: if a file has the name of one of ours.
    """
    of_model = {file.name for file in configuration_infini.code_files(Path(configuration_infini.__file__).parent)}
    with_weights = {name.split("/")[0] for name in checkpoint.sizes if "/" in name and is_weight_file(name)}
    left_out: dict[str, str] = {}
    for name in checkpoint.sizes:
        if name in checkpoint.weight_files:
            continue
        if (reason := _reason_to_leave(checkpoint, name, with_weights)) is not None:
            left_out |= reason
        elif name == (SOURCE_CARD if back else CARD):
            _copy(checkpoint.folder / name, folder / (CARD if back else SOURCE_CARD))
        elif name == SOURCE_CARD and not back:
            left_out[name] = "a conversion keeps its source's card by this name"
        elif name in of_model and not back:
            raise ValueError(f"The source's {name} has the name of a code file of the converted model. Rename it.")
        elif name not in (*TRANSLATED_FILES, *of_model):
            _copy(checkpoint.folder / name, folder / name)
    if left_out:
        logger.warning("Not copied: %s.", ", ".join(f"{name} ({left_out[name]})" for name in sorted(left_out)))


def _reason_to_leave(checkpoint: Checkpoint, name: str, with_weights: set[str]) -> dict[str, str] | None:
    """
    Why a file is left out, by its name or that of the folder that is left out with it; `None` if it is not.

    Args:
        with_weights: folders with weights of their own.
    """
    *parents, file_name = PurePosixPath(name).parts
    for depth, parent in enumerate(parents, 1):
        if is_hidden(parent):
            return {"/".join(parents[:depth]) + "/": "it is hidden"}
    if is_hidden(file_name):
        return {name: "it is hidden"}
    if parents and parents[0] in with_weights:
        return {parents[0] + "/": "it holds weights of its own"}
    if parents and parents[0] == CUSTOM_GENERATE:
        return {parents[0] + "/": "its generate() is written for another cache"}
    if is_weight_file(name):
        return {name: "weights or a state of training, which are not read"}
    if checkpoint.sizes.get(name, 0) > LARGEST_SIDE_FILE:
        return {name: f"more than {LARGEST_SIDE_FILE >> 20} MiB"}
    return None if (checkpoint.folder / name).is_file() else {name: "it is not there"}


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def write_fields(checkpoint: Checkpoint, target: Path, fields: dict[str, Any]) -> None:
    """Writes a JSON file that a conversion translates; byte for byte the source's where nothing changes."""
    source = checkpoint.folder / target.name
    if checkpoint.gguf is None and source.is_file() and read_json(source) == fields:
        shutil.copyfile(source, target)
    else:
        write_json(target, fields)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase | None:
    """
    The tokenizer that `AutoTokenizer` gives the source. `None`, with a warning that says why, if it has none, or none
    that can be loaded without running code of its own.
    """
    if checkpoint.gguf is None and not _has_tokenizer(checkpoint.folder):
        logger.warning("The source has no tokenizer, and so its conversion has none.")
        return None
    if _has_own_code(_settings(checkpoint)):
        logger.warning("The tokenizer has code of its own, which is copied and not run: ids are not compared.")
        return None
    if checkpoint.name is not None:
        # By their names on the Hub, transformers knows models whose tokenizers need another class than they name.
        checkpoint.config.name_or_path = checkpoint.name
    try:
        if checkpoint.gguf is not None:
            return checkpoint.gguf.tokenizer()
        return AutoTokenizer.from_pretrained(checkpoint.folder, config=checkpoint.config, trust_remote_code=False)
    # `tokenizers` raises Exception itself.
    except Exception as error:
        reason = " ".join(str(error).split())
        if checkpoint.gguf is not None:
            logger.warning("The GGUF file has no tokenizer that can be converted; the output has none. (%s)", reason)
        else:
            logger.warning("The tokenizer cannot be loaded: it is copied as it is, ids are not compared. (%s)", reason)
        return None


def tokenizer_of(source: str | os.PathLike) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a model in a folder or on the Hub.

    Raises:
        ValueError: if there is none; the message says where one comes from.
    """
    require_place(source)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{source} has no tokenizer that can be loaded, by which texts are read. Save that of its base there: "
            "AutoTokenizer.from_pretrained(base).save_pretrained(folder); of a .gguf file, a conversion writes one. "
            f"({reason:.200})"
        ) from error


def leading_bos(tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The id of the BOS token, if a tokenizer puts it before every text."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None  # type: ignore[misc]


def _has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)


def _has_own_code(settings: dict[str, Any]) -> bool:
    auto_map = settings.get("auto_map") or {}
    return isinstance(auto_map, list) or auto_map.get("AutoTokenizer") is not None


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Of the tokenizer, as its file has them."""
    file = checkpoint.folder / TOKENIZER_CONFIG
    return read_json(file) if file.is_file() and checkpoint.gguf is None else {}


def converted_settings(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """
    The settings of the source's tokenizer without a limit, and with the class that `AutoTokenizer` gives the source:
    it would be another one by the type of the converted model.
    """
    settings = _settings(checkpoint)
    settings |= {name: VERY_LARGE_INTEGER for name in LIMIT_FIELDS if settings.get(name) is not None}
    if tokenizer is not None:
        settings["tokenizer_class"] = type(tokenizer).__name__
    elif _has_tokenizer(checkpoint.folder) and not _has_own_code(settings):
        by_type = TOKENIZER_MAPPING_NAMES.get(checkpoint.config.model_type)
        settings |= {} if by_type is None else {"tokenizer_class": settings.get("tokenizer_class") or by_type}
    return settings


def replaced_settings(checkpoint: Checkpoint, settings: dict[str, Any]) -> dict[str, Any]:
    """The source's own values of what `settings` changes, `None` for what it has not: what the way back needs."""
    own = _settings(checkpoint)
    return {name: own.get(name) for name, value in settings.items() if own.get(name) != value}


def restored_settings(checkpoint: Checkpoint, limit: int) -> dict[str, Any]:
    """
    The settings of a converted tokenizer as its source has them.

    Args:
        limit: the most tokens, where that is not known from a source.
    """
    settings = _settings(checkpoint)
    origin = checkpoint.config.converted_from or {}
    own = origin.get("tokenizer_config")
    if own is None:
        # Conversions by earlier versions record the limit alone.
        limit = origin.get("model_max_length", limit)
        own = {"model_max_length": limit, "max_len": None} if _has_tokenizer(checkpoint.folder) else {}
    for name in LIMIT_FIELDS:
        if settings.get(name) not in (None, VERY_LARGE_INTEGER):
            # One that was set since.
            own = {**own, name: settings[name]}
    return {name: value for name, value in (settings | own).items() if name not in own or own[name] is not None}


def write_tokenizer(
    checkpoint: Checkpoint,
    folder: Path,
    settings: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    config: PreTrainedConfig,
) -> None:
    """
    Writes `settings` beside the tokenizer's files, and the class of `tokenizer` where it takes that.

    Args:
        tokenizer: the source's, which that of `folder` must equal; `None` if it is not known.
        config: of the model to which `folder` belongs.

    Raises:
        ValueError: if the tokenizer gives other ids or texts than the source's.
    """
    if settings:
        write_fields(checkpoint, folder / TOKENIZER_CONFIG, settings)
    difference = None if tokenizer is None else _difference(tokenizer, folder, config)
    if difference is not None and settings.get("tokenizer_class") != type(tokenizer).__name__:
        write_json(folder / TOKENIZER_CONFIG, settings | {"tokenizer_class": type(tokenizer).__name__})
        difference = _difference(tokenizer, folder, config)
    if difference is not None:
        raise ValueError(
            f"The tokenizer of the output {difference}: transformers treats the source's in a way that depends on the "
            "type of its model. Write it as it works there, and convert again: "
            "tokenizer = AutoTokenizer.from_pretrained(source); tokenizer.save_pretrained(source)."
        )


def _difference(tokenizer: PreTrainedTokenizerBase, folder: Path, config: PreTrainedConfig) -> str | None:
    """In which way the tokenizer of a folder is another one than `tokenizer`; `None` if in none."""
    try:
        written = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    except Exception as error:
        return f"cannot be loaded ({' '.join(str(error).split())})"
    special_tokens = [f"a {token} b{token}" for token in getattr(tokenizer, "all_special_tokens", [])]
    for text in (*HARD_TEXTS, *special_tokens):
        if _reading(written, text) != _reading(tokenizer, text):
            return f"gives other ids or texts than the source's for {text!r}"
    for name in ("special_tokens_map", "chat_template", "padding_side", "truncation_side", "model_input_names"):
        if getattr(written, name, None) != getattr(tokenizer, name, None):
            return f"has another {name} than the source's"
    return None


def _reading(tokenizer: PreTrainedTokenizerBase, text: str) -> Any:
    """All that a tokenizer makes of a text, or the error that it raises: one may have no unknown token."""
    try:
        encoding = tokenizer(text)
        ids = encoding["input_ids"]
        spoken = tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=True)
        return dict(encoding), tokenizer(text, add_special_tokens=False)["input_ids"], spoken
    except Exception as error:
        return str(error)


def convert_gguf_tokenizer(
    checkpoint: Checkpoint, folder: Path, tokenizer: PreTrainedTokenizerBase | None, config: PreTrainedConfig
) -> None:
    """Writes the tokenizer of a GGUF file, if it has one, without a limit. Raises as `write_tokenizer`."""
    if tokenizer is not None:
        tokenizer.model_max_length = VERY_LARGE_INTEGER
        tokenizer.save_pretrained(folder)
        write_tokenizer(checkpoint, folder, read_json(folder / TOKENIZER_CONFIG), tokenizer, config)


def generation_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """The source's generation configuration: its file, or else what its config.json says of generation."""
    if checkpoint.gguf is not None:
        return GenerationConfig.from_model_config(checkpoint.config).to_diff_dict()
    file = checkpoint.folder / GENERATION_CONFIG_NAME
    if file.is_file():
        return read_json(file)
    # A configuration that is loaded has lost these fields: transformers too reads them from the file.
    return GenerationConfig.from_pretrained(checkpoint.folder, CONFIG_NAME, _from_model_config=True).to_diff_dict()


def refused_generation_fields(
    fields: dict[str, Any], config: InfiniConfig, former: InfiniConfig | None = None
) -> dict[str, Any]:
    """
    Those of a source's generation configuration that a converted model cannot follow; a warning names them.

    Args:
        former: that of a conversion which follows the fields so far: what it could not follow either is the user's.
    """
    found = _beyond(fields, config)
    if former is not None:
        found = {name: value for name, value in found.items() if name not in _beyond(fields, former)}
    if found:
        listed = ", ".join(f"{name}={value!r}" for name, value in found.items())
        logger.warning(
            "Left out of generation_config.json, since a memory of constant size cannot follow them: %s. They are "
            "kept in converted_from for the way back.",
            listed,
        )
    return found


def _beyond(fields: dict[str, Any], config: InfiniConfig) -> dict[str, Any]:
    longest = config.segment_length
    proposes_too_much = (fields.get("num_assistant_tokens") or NUM_ASSISTANT_TOKENS) > longest
    refused = {
        # A limit on prompt and answer together would refuse a book; without its cache the model would forget it.
        "max_length": fields.get("max_length") is not None,
        "use_cache": fields.get("use_cache") is False,
        **{name: fields.get(name) is not None for name in CACHE_FIELDS},
        "cache_implementation": fields.get("cache_implementation") not in (None, "dynamic"),
        # No more than a segment can be taken back.
        **{name: (fields.get(name) or 0) > longest for name in PROPOSAL_FIELDS},
        "assistant_early_exit": fields.get("assistant_early_exit") is not None and proposes_too_much,
    }
    return {name: value for name, value in fields.items() if refused.get(name)}


def restored_generation_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """The generation configuration of a converted model with what was left out of its source's."""
    fields = generation_fields(checkpoint)
    restored = (checkpoint.config.converted_from or {}).get("generation_config", {}) | fields
    # As transformers writes it.
    return dict(sorted(restored.items())) if list(fields) == sorted(fields) else restored
