"""Models and texts, as they are named on the command line."""

import argparse
import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import StrictDataclassFieldValidationError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from conversion.gguf_files import GGUFFile, is_gguf
from modeling_infini import InfiniConfig  # also registers the model with the Auto classes

from .resources import king_james_bible


def load_model(source: str | Path, **options: Any) -> PreTrainedModel:
    """The causal language model in a folder, a `.gguf` file or on the Hub; `options` as of `from_pretrained`."""
    if not is_gguf(source):
        return AutoModelForCausalLM.from_pretrained(source, **options)
    # As a conversion reads it: transformers' reader passes over scaled angles, windows and more.
    file = GGUFFile(Path(source))
    weights = {name: file.read(name) for name in file.shapes}
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(file.config)]
    return model_class.from_pretrained(None, config=file.config, state_dict=weights, **options)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, a `.gguf` file or on the Hub."""
    if is_gguf(source):
        return GGUFFile(Path(source)).tokenizer()
    return AutoTokenizer.from_pretrained(source)


def segment_length_of(source: str | Path) -> int:
    """
    Segment length of the Infini-attention model in a folder or on the Hub.

    Raises:
        ValueError: if it is another model.
    """
    config = GGUFFile(Path(source)).config if is_gguf(source) else AutoConfig.from_pretrained(source)
    if not hasattr(config, "segment_length"):
        raise ValueError(f"{source} holds a {config.model_type} model, not one with Infini-attention.")
    return config.segment_length


def config_fields(overrides: str) -> dict[str, Any]:
    """
    Fields of [`InfiniConfig`] from the command line: `field=value,field=value`, with the types that the fields have.
    Values are as in JSON (`true`, `null`, `[1, 2]`, `{"rope_type": "default"}`), but texts need no quotes.

    Raises:
        ValueError: if there is no such field, or it has no such value; the message names it.
    """
    found: dict[str, Any] = {}
    for name, text in _assignments(overrides):
        if name in found:
            raise ValueError(f"{name} is set twice in {overrides!r}.")
        found[name] = _field_value(name, text)
    return found


def _assignments(overrides: str) -> Iterator[tuple[str, str]]:
    """The names and values in `field=value,field=value`, of which a value may be JSON with commas of its own."""
    place = 0
    while place < len(overrides):
        name = re.compile(r"\s*(\w+)\s*=\s*").match(overrides, place)
        if name is None:
            raise ValueError(f"Write fields of the configuration as field=value,field=value; got {overrides!r}.")
        start = name.end()
        if overrides[start : start + 1] in ("[", "{", '"'):
            try:
                end = json.JSONDecoder().raw_decode(overrides, start)[1]
            except json.JSONDecodeError as error:
                raise ValueError(f"The value of {name[1]} is no JSON: {error}.") from error
        else:
            end = len(overrides) if (comma := overrides.find(",", start)) < 0 else comma
        if overrides[end : end + 1].strip(" ") not in ("", ","):
            raise ValueError(f"After the value of {name[1]}, write a comma or nothing; got {overrides[end:]!r}.")
        yield name[1], overrides[start:end].strip()
        place = end + 1


def _field_value(name: str, text: str) -> Any:
    names = [field.name for field in fields(InfiniConfig)]  # type: ignore[arg-type]
    if name not in names:
        close = difflib.get_close_matches(name, names, 1)
        raise ValueError(f"InfiniConfig has no field {name}.{f' Did you mean {close[0]}?' if close else ''}")
    try:
        value = json.loads(text.lower() if text.lower() in ("true", "false", "null", "none") else text)
    except json.JSONDecodeError:
        value = None if text.lower() == "none" else text
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    # Some fields are annotated as float alone; and a text may look like a number.
    candidates = [value, *([float(value)] if is_whole else []), text]
    config, refusals = InfiniConfig(), []
    for candidate in candidates:
        try:
            setattr(config, name, candidate)
        except StrictDataclassFieldValidationError as error:
            refusals.append(error.__cause__ or error)
        else:
            return candidate
    raise ValueError(f"{name}={text} is no value for this field. {refusals[0]}.")


def add_text_arguments(parser: argparse.ArgumentParser, tokens: int) -> None:
    """Adds `--text` and `--tokens`, of which `tokens` is the default."""
    parser.add_argument(
        "--text",
        type=Path,
        action="append",
        help="a text file; may be given several times (default: the King James Bible)",
    )
    parser.add_argument(
        "--tokens", type=int, default=tokens, help="how much of each text is read (default: %(default)s)"
    )


def read_texts(files: Sequence[Path] | None) -> dict[str, str]:
    """
    Texts by the names of their files, or the King James Bible.

    Raises:
        ValueError: if two files have the same name.
    """
    if not files:
        return {"King James Bible": king_james_bible()}
    texts = {file.stem: file.read_text(encoding="utf-8") for file in files}
    if len(texts) < len(files):
        raise ValueError(f"Texts go by the names of their files, which must differ: {', '.join(map(str, files))}.")
    return texts


def first_tokens(tokenizer: PreTrainedTokenizerBase, texts: dict[str, str], tokens: int) -> dict[str, torch.Tensor]:
    """Ids of the first tokens of each text, `(1, tokens)` or fewer."""
    return {name: tokenizer(text.strip(), return_tensors="pt").input_ids[:, :tokens] for name, text in texts.items()}
