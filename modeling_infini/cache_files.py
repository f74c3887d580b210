"""
Caches as files: the tensors in safetensors, and in its header what they are of.

A file may come from anybody. What is read of it is a closed set of fields and tensors, each of a known kind, and no
more room is made than twice what the file itself takes.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .configuration_infini import InfiniConfig


CACHE_FILE = "infini_cache.safetensors"
FORMAT = "infini_cache"
FORMAT_VERSION = 3
FIELDS = {"format_version": (int,), "model": (dict,), "weights": (str, type(None))}
REMEDY = f"This code reads version {FORMAT_VERSION}: read the text again with the model, and save the cache anew."
# Bytes of a header that no cache needs: Python's objects take many times the room of the JSON that they are read from.
MAX_HEADER = 1_000_000
# More columns than that do not fit the sums of two such numbers.
MAX_COLUMNS = 2**60
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def write_cache(folder: Path, tensors: dict[str, torch.Tensor], config: InfiniConfig, fingerprint: str | None) -> None:
    """
    Writes a cache into `folder`: at every moment, the folder holds the old cache or the new one.

    Args:
        tensors: the states of the layers and the counters, by name.
        fingerprint: of the weights that made the cache; `None`: not known.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"format_version": FORMAT_VERSION, "model": config.memory_fields(), "weights": fingerprint})
    folder.mkdir(parents=True, exist_ok=True)
    # Not by the process's number: two machines that share a disk may have the same.
    temporary = folder / f".{CACHE_FILE}.{uuid4().hex}.tmp"
    try:
        # Not by save_file, whose files nobody else may read.
        with temporary.open("wb") as stream:
            stream.write(save(tensors, {FORMAT: text, "sha256": digest_of(text, tensors)}))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(folder / CACHE_FILE)
    finally:
        temporary.unlink(missing_ok=True)
    for file in _files_of_earlier_formats(folder):
        file.unlink(missing_ok=True)


def read_cache(
    folder: Path, config: InfiniConfig, expected: Callable[[int, torch.dtype], dict[str, torch.Tensor]]
) -> tuple[str | None, dict[str, torch.Tensor]]:
    """
    The fingerprint and tensors of a cache that [`write_cache`] wrote.

    Args:
        config: of the model that will use it.
        expected: gives the tensors that a cache of so many rows of that dtype has, on the meta device.

    Raises:
        FileNotFoundError: if the folder holds no saved cache.
        ValueError: if it is damaged, or was made by another model or version.
    """
    file = folder / CACHE_FILE
    if not file.is_file():
        if _files_of_earlier_formats(folder):
            raise ValueError(f"The cache in {folder} has an earlier format, of several files. {REMEDY}")
        raise FileNotFoundError(f"{folder} holds no saved cache: there is no {CACHE_FILE}.")
    damage = f"The cache in {folder} is damaged:"
    with file.open("rb") as stream:
        if int.from_bytes(stream.read(8), "little") > MAX_HEADER:
            raise ValueError(f"{damage} the header of {CACHE_FILE} is longer than {MAX_HEADER:,} bytes.")
    try:
        with safe_open(file, "pt") as content:
            texts = content.metadata() or {}
            names = content.keys()
            # Clones: what is read is a view of the file.
            tensors = {name: content.get_tensor(name).clone() for name in names}
        text = texts.get(FORMAT, "{}")
        digest, fields = digest_of(text, tensors), json.loads(text)
    # Of dtypes that safetensors knows and PyTorch does not, there is no error of one kind.
    except (SafetensorError, AttributeError, OSError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{damage} {CACHE_FILE} cannot be read ({error}).") from error
    if not isinstance(fields, dict) or "format_version" not in fields:
        raise ValueError(f"{file} does not describe a cache of an Infini-attention model.")
    if (version := fields["format_version"]) != FORMAT_VERSION:
        raise ValueError(f"The cache in {folder} has format version {version!r:.20}. {REMEDY}")
    if texts.get("sha256") != digest:
        raise ValueError(f"{damage} {CACHE_FILE} is not what was saved.")
    if fields.keys() != FIELDS.keys() or any(type(fields[name]) not in FIELDS[name] for name in FIELDS):
        raise ValueError(f"{damage} its metadata must have the fields {', '.join(FIELDS)}, each of its kind.")
    config.require_same_memory(fields["model"], f"The cache in {folder}")
    absent = torch.empty(1)
    rows, dtype = tensors.get("tokens_read", absent).numel(), tensors.get("layers.0.keys", absent).dtype
    wanted = expected(max(rows, 1), dtype if dtype in DTYPES else absent.dtype)
    for name in sorted(wanted.keys() | tensors.keys()):
        here, fit = (
            f"{of[name].dtype} {tuple(of[name].shape)}" if name in of else "missing" for of in (tensors, wanted)
        )
        if here != fit:
            raise ValueError(f"The cache in {folder} does not fit this model: {name:.50} is {here}, not {fit}.")
        if tensors[name].is_floating_point() and not tensors[name].isfinite().all():
            raise ValueError(f"{damage} {name} holds NaN or infinity.")
    columns, read, slots = (tensors[name] for name in ("columns", "tokens_read", "slot_columns"))
    limits = ((columns, MAX_COLUMNS), (read, columns + 1), (slots, max(columns, 1)))
    if any(values.min() < 0 or values.max() >= limit for values, limit in limits):
        raise ValueError(f"{damage} what it says to have read where cannot be.")
    return fields["weights"], tensors


def digest_of(text: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _files_of_earlier_formats(folder: Path) -> list[Path]:
    return [*folder.glob("infini_cache.json"), *folder.glob("infini_cache-*.safetensors")]
