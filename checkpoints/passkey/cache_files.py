"""
Caches as files: safetensors, with what they are in JSON beside it.

A file may come from anybody. What is read of it is a closed set of fields, each of a known kind and in a known range,
and no more room is made than the file itself takes.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from .configuration_infini import InfiniConfig


METADATA_FILE = "infini_cache.json"
FILE_FORMAT = "infini_cache"
FILE_VERSION = 2

# Sizes in bytes that no cache needs: of the metadata, and of the safetensors header for each tensor. Python's objects
# take many times the room of the JSON that they are read from.
MAX_METADATA = 1_000_000
MAX_HEADER = 1_000

# The kinds of the fields of the metadata. More columns than that do not fit the sums of two such numbers.
FIELDS = {
    "format": str,
    "format_version": int,
    "model": dict,
    "weights": str | None,
    "dtype": str,
    "columns": int,
    "tokens_read": list,
    "tensor_file": str,
}
DTYPES = ("float64", "float32", "bfloat16", "float16")
MAX_COLUMNS = 2**60


def describe(tensor: torch.Tensor | None) -> str:
    """Dtype and shape, for error messages."""
    return "missing" if tensor is None else f"{_dtype_name(tensor)} {tuple(tensor.shape)}"


def write_cache(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    config: InfiniConfig,
    fingerprint: str | None,
    columns: int,
    tokens_read: list[int],
) -> None:
    """
    Writes a cache into `folder`: at every moment, the folder holds the old cache or the new one.

    Args:
        tensors: the states of the layers and the counters, by name.
        fingerprint: of the weights that made the cache; `None`: not known.
        columns: number of columns fed.
        tokens_read: number of tokens that each row's stream has read.
    """
    payload = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()})
    tensor_file = f"infini_cache-{_digest(payload)}.safetensors"
    metadata = {
        "format": FILE_FORMAT,
        "format_version": FILE_VERSION,
        "model": config.memory_fields(),
        "weights": fingerprint,
        "dtype": _dtype_name(tensors["layers.0.keys"]),
        "columns": columns,
        "tokens_read": tokens_read,
        "tensor_file": tensor_file,
    }
    text = json.dumps(metadata, indent=2).encode()
    if len(text) > MAX_METADATA:
        raise ValueError(f"A cache of {len(tokens_read):,} rows is too large for a file: save fewer rows at a time.")
    folder.mkdir(parents=True, exist_ok=True)
    # The JSON file names the tensors by their digest, so that replacing it switches to the new cache at once.
    _write_atomically(folder / tensor_file, payload)
    _write_atomically(folder / METADATA_FILE, text)
    for file in folder.glob("infini_cache-*.safetensors"):
        if file.name != tensor_file:
            file.unlink()


def read_cache(
    folder: Path, config: InfiniConfig, expected: Callable[[int, torch.dtype], dict[str, torch.Tensor]]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """
    The metadata and tensors of a cache that [`write_cache`] wrote.

    Args:
        config: of the model that will use it.
        expected: gives the tensors that a cache of so many rows of that dtype has, on the meta device.

    Raises:
        FileNotFoundError: if the folder holds no saved cache.
        ValueError: if it is damaged, or was made by another model or version.
    """
    metadata = _read_metadata(folder)
    config.require_same_memory(metadata["model"], f"The cache in {folder}")
    wanted = expected(len(metadata["tokens_read"]), getattr(torch, metadata["dtype"]))
    tensor_file = folder / metadata["tensor_file"]
    if not tensor_file.is_file():
        raise ValueError(f"The cache in {folder} is incomplete: {tensor_file.name} is missing.")
    tensors = _read_tensors(folder, tensor_file, MAX_HEADER * len(wanted))
    # First what says how many rows there are.
    for name in ("tokens_read", *sorted(wanted.keys() | tensors.keys())):
        if (found := describe(tensors.get(name))) != (fit := describe(wanted.get(name))):
            raise ValueError(
                f"The cache in {folder} does not fit this model and its metadata: {name} is {found}, not {fit}."
            )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"The cache in {folder} is damaged: {name} holds NaN or infinity.")
    if not _counts_are_possible(metadata, tensors, config):
        raise ValueError(f"The cache in {folder} is damaged: what it says to have read where cannot be.")
    return metadata, tensors


def _read_tensors(folder: Path, tensor_file: Path, max_header: int) -> dict[str, torch.Tensor]:
    payload = tensor_file.read_bytes()
    if tensor_file.name != f"infini_cache-{_digest(payload)}.safetensors":
        raise ValueError(f"The cache in {folder} is damaged: {tensor_file.name} is not what was saved.")
    if int.from_bytes(payload[:8], "little") > max_header:
        raise ValueError(f"The cache in {folder} is damaged: {tensor_file.name} says too much about its tensors.")
    try:
        return load(payload)
    # Of dtypes that safetensors knows and PyTorch or its loader does not, there is no error of one kind.
    except (SafetensorError, AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"The cache in {folder} is damaged: {tensor_file.name} cannot be read ({error}).") from error


def _counts_are_possible(metadata: dict[str, Any], tensors: dict[str, torch.Tensor], config: InfiniConfig) -> bool:
    """
    Whether the columns of the tokens that can still be seen grow with their positions, from those read before on to
    those that follow.
    """
    read, slot_columns, columns = tensors["tokens_read"].unsqueeze(1), tensors["slot_columns"], metadata["columns"]
    if metadata["tokens_read"] != read.squeeze(1).tolist() or not ((read >= 0) & (read <= columns)).all():
        return False
    if not ((slot_columns >= 0) & (slot_columns < max(columns, 1))).all():
        return False
    length, sinks = config.segment_length, torch.arange(config.num_sink_tokens)
    slots = torch.arange(length)
    of_ring = (read - 1 - slots).div(length, rounding_mode="floor") * length + slots
    is_seen = of_ring >= 0 if config.is_sliding else slots < read % length
    positions = torch.cat([sinks.expand(len(read), -1), of_ring], 1)
    is_seen = torch.cat([sinks < read, is_seen], 1)
    # The columns before a token that are not of its stream, of which there are ever more.
    others = torch.where(is_seen, slot_columns - positions, columns - read)
    others = others.gather(1, positions.masked_fill(~is_seen, MAX_COLUMNS).argsort(dim=1, stable=True))
    others = torch.cat([torch.zeros_like(read), others, columns - read], 1)
    return bool((others.diff(dim=1) >= 0).all())


def _digest(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()[:16]


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _read_metadata(folder: Path) -> dict[str, Any]:
    file = folder / METADATA_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no saved cache: there is no {METADATA_FILE}.")
    damage = f"The cache in {folder} is damaged: {METADATA_FILE}"
    with file.open("rb") as stream:
        text = stream.read(MAX_METADATA + 1)
    if len(text) > MAX_METADATA:
        raise ValueError(f"{damage} is longer than {MAX_METADATA:,} bytes.")
    try:
        metadata = json.loads(text.decode(), object_pairs_hook=_fields_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{damage} is not JSON that can be read ({error}).") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FILE_FORMAT:
        raise ValueError(f"{file} does not describe a cache of an Infini-attention model.")
    if (version := metadata.get("format_version")) != FILE_VERSION or type(version) is not int:
        raise ValueError(
            f"The cache in {folder} has format version {version!r:.20}; this code reads version {FILE_VERSION}. Read "
            "the text again with the model, and save the cache anew."
        )
    for name in metadata.keys() - FIELDS.keys():
        raise ValueError(f"{damage} has a field that is not known: {name!r:.50}.")
    for name, kind in FIELDS.items():
        if name not in metadata or not isinstance(metadata[name], kind) or isinstance(metadata[name], bool):
            raise ValueError(f"{damage} has no valid {name}.")
    counts = [metadata["columns"], *metadata["tokens_read"]]
    if not all(type(count) is int and 0 <= count <= MAX_COLUMNS for count in counts):
        raise ValueError(f"{damage} has no valid columns or tokens_read: they must be counts.")
    if not metadata["tokens_read"]:
        raise ValueError(f"{damage} has no rows.")
    if metadata["dtype"] not in DTYPES:
        raise ValueError(f"{damage} cannot be: dtype {metadata['dtype']:.20} is none of {DTYPES}.")
    if not re.fullmatch(r"infini_cache-[0-9a-f]{16}\.safetensors", metadata["tensor_file"]):
        raise ValueError(
            f"{damage} has no valid tensor_file: it must be a file name as save_pretrained gives it, not a path."
        )
    return metadata


def _fields_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field stands in it twice")
    return fields


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _write_atomically(file: Path, payload: bytes) -> None:
    # Not by the process's number: two machines that share a disk may have the same.
    temporary = file.with_name(f".{file.name}.{uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
