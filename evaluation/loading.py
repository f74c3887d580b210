"""Models and texts, as they are named on the command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

import modeling_infini  # noqa: F401  registers the model with the Auto classes
from infini_transformers.conversion.checkpoints import read_json
from infini_transformers.conversion.config_overrides import config_fields as config_fields
from infini_transformers.conversion.gguf_files import GGUFFile, is_gguf
from infini_transformers.conversion.small_files import tokenizer_of
from infini_transformers.conversion.wrong_sources import what_it_holds
from modeling_infini.modeling_infini import require_place

from .resources import king_james_bible


def load_model(source: str | Path, **options: Any) -> PreTrainedModel:
    """
    The causal language model in a folder, a `.gguf` file or on the Hub; `options` as of `from_pretrained`.

    Raises:
        ValueError: if there is no such dtype or device, or weights are missing, which would be random ones.
    """
    _require_dtype_and_device(options.get("dtype"), options.get("device_map"))
    if not is_gguf(source):
        require_place(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, **options, output_loading_info=True)
        model, found = loaded
        if missing := sorted(found["missing_keys"]):
            raise ValueError(
                f"{source} lacks {missing[0]} ({len(missing)} weights in all): it is no whole causal language model."
            )
        return model
    # As a conversion reads it: transformers' reader passes over scaled angles, windows and more.
    file = GGUFFile(_gguf_path(source))
    weights = {name: file.read(name) for name in file.shapes}
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(file.config)]
    return model_class.from_pretrained(None, config=file.config, state_dict=weights, **options)


def _require_dtype_and_device(dtype: Any, device: Any) -> None:
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f'There is no dtype "{dtype}". It is float32, bfloat16 or float16, or "auto": as saved.')
    if isinstance(device, str) and device not in ("auto", "balanced", "balanced_low_0", "sequential"):
        try:
            torch.empty(0, device=device)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f'There is no device "{device}" here. {error}') from error


def _gguf_path(source: str | Path) -> Path:
    if not Path(source).is_file():
        raise FileNotFoundError(f"There is no GGUF file {source}.")
    return Path(source)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, a `.gguf` file or on the Hub."""
    if is_gguf(source):
        return GGUFFile(_gguf_path(source)).tokenizer()
    return tokenizer_of(source)


def config_of(source: str | Path) -> Any:
    """The configuration of the model in a folder, a `.gguf` file or on the Hub; an adapter's folder has its base's."""
    require_place(source)
    if is_gguf(source):
        return GGUFFile(_gguf_path(source)).config
    folder = Path(source)
    if folder.is_dir() and not (folder / CONFIG_NAME).exists():
        if (folder / ADAPTER_CONFIG_NAME).is_file():
            base = read_json(folder / ADAPTER_CONFIG_NAME).get("base_model_name_or_path")
            if not base or Path(base).resolve() == folder.resolve():
                raise ValueError(f"{source} is an adapter of PEFT that does not name its base.")
            return config_of(base)
        names = [path.relative_to(folder).as_posix() for depth in ("*", "*/*") for path in folder.glob(depth)]
        raise FileNotFoundError(f"{source} has no {CONFIG_NAME}.{what_it_holds(names)}")
    try:
        return AutoConfig.from_pretrained(source)
    except OSError as error:
        if folder.exists():
            raise
        raise OSError(f"{source} is no folder or file, and no id of the Hub that can be read. ({error})") from error


def segment_length_of(source: str | Path) -> int:
    """
    Segment length of the Infini-attention model in a folder or on the Hub.

    Raises:
        ValueError: if it is another model.
    """
    config = config_of(source)
    if not hasattr(config, "segment_length"):
        raise ValueError(
            f"{source} holds a {config.model_type} model, not one with Infini-attention: `infini convert` makes one."
        )
    return config.segment_length


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
