"""Fields of the configuration as they are written on a command line."""

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import StrictDataclassFieldValidationError

from modeling_infini import InfiniConfig


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
