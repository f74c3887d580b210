"""Caches as files: safetensors, with what they are in JSON beside it."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from .configuration_infini import InfiniConfig


METADATA_FILE = "infini_cache.json"
FILE_FORMAT = "infini_cache"
FILE_VERSION = 1

FINGERPRINT_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_parameters",
    "rms_norm_eps",
    "hidden_act",
    "attention_bias",
    "qkv_bias",
    "attention_output_bias",
    "mlp_bias",
    "segment_length",
    "local_attention",
    "num_sink_tokens",
    "use_mem_delta_rule",
    "learned_delta_update",
    "memory_norm_init_scale",
    "memory_write_gate",
    "memory_eps",
    "qk_norm",
)


def _fingerprint(config: InfiniConfig) -> dict[str, Any]:
    """The fields of a configuration that a cache depends on, as JSON would return them."""
    return json.loads(json.dumps({name: getattr(config, name) for name in FINGERPRINT_FIELDS}))


def describe(tensor: torch.Tensor | None) -> str:
    """Dtype and shape, for error messages."""
    return "missing" if tensor is None else f"{_dtype_name(tensor)} {tuple(tensor.shape)}"


def write_cache(
    folder: Path, tensors: dict[str, torch.Tensor], config: InfiniConfig, columns: int, tokens_read: list[int]
) -> None:
    """
    Writes a cache into `folder`: at every moment, the folder holds the old cache or the new one.

    Args:
        tensors: the states of the layers and the counters, by name.
        columns: number of columns fed.
        tokens_read: number of tokens that each row's stream has read.
    """
    payload = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()})
    tensor_file = f"infini_cache-{_digest(payload)}.safetensors"
    metadata = {
        "format": FILE_FORMAT,
        "format_version": FILE_VERSION,
        "model": _fingerprint(config),
        "dtype": _dtype_name(tensors["layers.0.keys"]),
        "columns": columns,
        "tokens_read": tokens_read,
        "tensor_file": tensor_file,
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    # The JSON file names the tensors by their digest, so that replacing it switches to the new cache at once.
    _write_atomically(folder / tensor_file, payload)
    _write_atomically(folder / METADATA_FILE, json.dumps(metadata, indent=2).encode())
    for file in folder.glob("infini_cache-*.safetensors"):
        if file.name != tensor_file:
            file.unlink()


def read_cache(folder: Path, config: InfiniConfig) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """
    The metadata and tensors of a cache that [`write_cache`] wrote.

    Raises:
        FileNotFoundError: if the folder holds no saved cache.
        ValueError: if it is damaged, or was made by another model or version.
    """
    metadata = _read_metadata(folder)
    for name, expected in _fingerprint(config).items():
        if (found := metadata["model"].get(name)) != expected:
            raise ValueError(
                f"The cache in {folder} belongs to another model: it was made with {name}={found!r}, and this "
                f"model has {name}={expected!r}."
            )
    tensor_file = folder / metadata["tensor_file"]
    if not tensor_file.is_file():
        raise ValueError(f"The cache in {folder} is incomplete: {tensor_file.name} is missing.")
    payload = tensor_file.read_bytes()
    if _digest(payload) not in tensor_file.name:
        raise ValueError(f"The cache in {folder} is damaged: {tensor_file.name} is not what was saved.")
    try:
        tensors = load(payload)
    except SafetensorError as error:
        raise ValueError(f"The cache in {folder} is damaged: {tensor_file.name} cannot be read ({error}).") from error
    # Before anybody makes room for as many rows as the metadata has.
    rows, expected = describe(tensors.get("tokens_read")), f"int64 ({len(metadata['tokens_read'])},)"
    if rows != expected:
        raise ValueError(f"The cache in {folder} is damaged: tokens_read is {rows}, and its metadata has {expected}.")
    return metadata, tensors


def _digest(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()[:16]


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _read_metadata(folder: Path) -> dict[str, Any]:
    file = folder / METADATA_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no saved cache: there is no {METADATA_FILE}.")
    try:
        metadata = json.loads(file.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"The cache in {folder} is damaged: {METADATA_FILE} is not JSON ({error}).") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FILE_FORMAT:
        raise ValueError(f"{file} does not describe a cache of an Infini-attention model.")
    if metadata.get("format_version") != FILE_VERSION:
        raise ValueError(
            f"The cache in {folder} has format version {metadata.get('format_version')}; this code reads version "
            f"{FILE_VERSION}."
        )
    fields = {"model": dict, "dtype": str, "columns": int, "tokens_read": list, "tensor_file": str}
    for name, kind in fields.items():
        if not isinstance(metadata.get(name), kind):
            raise ValueError(f"The cache in {folder} is damaged: {METADATA_FILE} has no valid {name}.")
    dtypes = ("float64", "float32", "bfloat16", "float16")
    if metadata["dtype"] not in dtypes:
        raise ValueError(f"The cache in {folder} is damaged: dtype {metadata['dtype']} is none of {dtypes}.")
    if not metadata["tokens_read"]:
        raise ValueError(f"The cache in {folder} is damaged: it has no rows.")
    if Path(metadata["tensor_file"]).name != metadata["tensor_file"]:
        raise ValueError(f"The cache in {folder} is damaged: tensor_file must be a file name, not a path.")
    return metadata


def _write_atomically(file: Path, payload: bytes) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
